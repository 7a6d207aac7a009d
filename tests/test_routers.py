"""LayerRouters: what they decide, and which models they accept."""

import copy
import math

import pytest
import torch
from families import LAYERS, prompts, tiny
from hypothesis import given
from hypothesis import strategies as st
from oracles import padded
from torch import nn

from drllm_fast.policies import PromptBatch, RoutingPolicy
from drllm_fast.routers import LayerRouters, choose

SIZES = {"num_layers": 3, "hidden_size": 16, "router_size": 8}


def made(seed=0, **changes):
    return LayerRouters(**(SIZES | changes), generator=torch.Generator().manual_seed(seed))


def batch(lengths=(1, 7, 8, 9, 17, 47), d=16, dtype=torch.float32):
    torch.manual_seed(3)
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PromptBatch((4 * torch.randn(sum(lengths), d)).to(dtype), cu)


def oracle(routers, layer, hidden):
    """The logits of one prompt [n, d], with nn.Linear and one window at a time."""
    first, second = nn.Linear(routers.hidden_size, routers.router_size), nn.Linear(routers.router_size, 3)
    first.weight.data, first.bias.data = routers.w1[layer].data, routers.b1[layer].data
    second.weight.data, second.bias.data = routers.w2[layer].data, routers.b2[layer].data
    count = min(routers.windows, len(hidden))
    size = len(hidden) // count
    out = torch.zeros(3)
    for w in range(count):
        out += second(nn.GELU("tanh")(first(hidden[w * size : (w + 1) * size].float().mean(0))))
    return (out / count).detach()


# -- decisions --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("windows", [1, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_decides_with_its_own_router(windows, dtype):
    routers, prompt_batch = made(windows=windows), batch(dtype=dtype)
    for p in (routers.b1, routers.b2):
        nn.init.normal_(p)
    ends = prompt_batch.cu_seqlens.tolist()
    seen = set()
    for layer in range(3):
        expected = torch.stack(
            [oracle(routers, layer, prompt_batch.hidden[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
        )
        logits, decisions = routers.logits(layer, prompt_batch), routers.route(layer, prompt_batch)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert decisions.dtype == torch.int8 and decisions.tolist() == expected.argmax(1).tolist()
        assert logits.requires_grad and not decisions.requires_grad
        seen |= set(decisions.tolist())
    assert len(seen) > 1


def test_empty_batch_and_empty_rows():
    routers = made()
    for b2 in (routers.b2, routers.b1):
        nn.init.normal_(b2, 5)
    assert routers.route(0, batch([])).tolist() == []
    assert routers.route(0, batch([0])).tolist() == [1]
    assert routers.route(0, batch([0, 9]))[1] == routers.route(0, batch([9]))[0]


@pytest.mark.parametrize(
    "logits, decision",
    [
        ([0, 0, 0], 1), ([1, 1, 0], 1), ([0, 1, 1], 1), ([1, 0, 1], 1), ([2, 1, 0], 0), ([0, 1, 2], 2), ([0, 2, 1], 1)
    ],
)  # fmt: skip
def test_ties_execute(logits, decision):
    assert choose(torch.tensor([logits], dtype=torch.float32)).tolist() == [decision]


def blended(logits, knob):
    """The blend in plain Python, written from its four anchors."""
    e = [math.exp(z - max(logits)) for z in logits]
    router = [x / sum(e) for x in e]
    at = {-1: [1, 0, 0], -0.5: router, 0.5: [0, 1, 0], 1: [0, 0, 1]}
    for low, high in ((-1, -0.5), (-0.5, 0.5), (0.5, 1)):
        if low <= knob <= high:
            t = (knob - low) / (high - low)
            return [(1 - t) * a + t * b for a, b in zip(at[low], at[high], strict=True)]


@given(st.lists(st.floats(-6, 6), min_size=3, max_size=3), st.floats(-1, 1))
def test_the_knob_blends_between_its_anchors(logits, knob):
    p = blended(logits, knob)
    best = sorted(p)
    decision = choose(torch.tensor([logits]), knob).item()
    if best[2] - best[1] > 1e-5:
        assert decision == p.index(best[2])


def test_the_knob_at_its_marks():
    logits = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5]])
    decided = {knob: choose(logits, knob).tolist() for knob in (-1, -0.76, -0.7, -0.5, -0.1, 0, 0.5, 0.75, 0.76, 1)}
    assert decided == {
        -1: [0, 0, 0], -0.76: [0, 0, 0], -0.7: [0, 1, 2], -0.5: [0, 1, 2], -0.1: [0, 1, 2],
        0: [1, 1, 1], 0.5: [1, 1, 1], 0.75: [1, 1, 1], 0.76: [2, 2, 2], 1: [2, 2, 2],
    }  # fmt: skip
    assert choose(torch.tensor([[0.1, 0, 0], [0, 0, 0.1]]), -0.6).tolist() == [0, 0]  # a nudge towards skipping
    assert choose(torch.tensor([[0.1, 0, 0], [0, 0, 0.1]]), -0.4).tolist() == [1, 1]  # and towards executing


def test_route_uses_the_knob():
    routers = made()
    for knob, decision in ((-1, 0), (0.5, 1), (1, 2)):
        routers.knob = knob
        assert set(routers.route(1, batch()).tolist()) == {decision}


@pytest.mark.parametrize("value, error", [(1.01, ValueError), (-2, ValueError), (math.nan, ValueError),
                                          ("0", TypeError), (None, TypeError), (True, TypeError)])  # fmt: skip
def test_the_knob_is_checked(value, error):
    routers = made()
    with pytest.raises(error, match="knob must be"):
        routers.knob = value
    assert routers.knob == -0.5
    with pytest.raises(error, match="knob must be"):
        made(knob=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("zeroed", [False, True])
def test_states_that_are_not_finite_are_refused(value, zeroed):
    routers, prompt_batch = made(), batch([9, 9, 9])
    if zeroed:
        nn.init.zeros_(routers.w1)
    prompt_batch.hidden[9 + 4, 3] = value
    with pytest.raises(ValueError, match=r"layer 2: the hidden states of rows \[1\]"):
        routers.route(2, prompt_batch)


def test_overflow_in_the_router_is_refused():
    routers = made()
    nn.init.constant_(routers.b2[1], math.inf)
    routers.route(0, batch())
    with pytest.raises(ValueError, match=r"layer 1: the hidden states of rows \[0, 1\] are not finite, or overflow"):
        routers.route(1, batch([2, 3]))


def test_route_keeps_no_graph(monkeypatch):
    modes = []
    monkeypatch.setattr(
        LayerRouters,
        "_decide",
        lambda *args: modes.append(torch.is_grad_enabled()) or (torch.zeros(1, 3), torch.ones(1, dtype=torch.int8)),
    )
    made().route(0, batch())
    assert modes == [False]


def test_logits_are_differentiable_after_decisions():
    """Decisions are made in inference mode; what they leave behind serves gradients, too."""
    routers = made()
    routers.route(1, batch())
    routers.logits(1, batch()).sum().backward()
    assert routers.w1.grad[1].any() and not routers.w1.grad[0].any()


def test_the_routers_follow_layer_0_to_its_device():
    # The meta device stands in for an accelerator, as far as it goes: to reading the logits.
    routers = made()
    elsewhere = PromptBatch(batch().hidden.to("meta"), batch().cu_seqlens.to("meta"))
    for layer, device in ((1, "cpu"), (0, "meta")):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="meta"):
            routers.logits(layer, elsewhere)
        assert {p.device.type for p in routers.parameters()} == {device}
    assert not any(p.is_inference() for p in routers.parameters())


def test_bad_calls():
    routers = made()
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer must be from 0 to 2, got {layer}"):
            routers.route(layer, batch())
    with pytest.raises(ValueError, match=r"hidden must be \[P, 16\], got \[3, 17\]"):
        routers.route(0, batch([3], d=17))


def test_routers_in_half_precision_still_compute_in_fp32():
    prompt_batch, routers = batch(), made().to(torch.bfloat16)
    rounded = copy.deepcopy(routers).float()
    assert torch.equal(routers.logits(1, prompt_batch), rounded.logits(1, prompt_batch))


# -- construction -----------------------------------------------------------------------------------------------------
def test_initial_weights_are_xavier_uniform_layer_by_layer():
    routers = made(num_layers=2, hidden_size=300, router_size=100)
    for w in (*routers.w1, *routers.w2):
        bound = (6 / sum(w.shape)) ** 0.5
        assert 0.98 * bound < w.abs().max() <= bound
        assert w.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not routers.b1.any() and not routers.b2.any()
    assert not torch.equal(routers.w1[0], routers.w1[1])
    assert {p.dtype for p in routers.parameters()} == {torch.float32}
    assert isinstance(routers, RoutingPolicy)


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "router_size", "windows"])
@pytest.mark.parametrize("value, error", [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_sizes_are_checked(name, value, error):
    with pytest.raises(error, match=f"{name} must be"):
        made(**{name: value})


def test_base_model_is_checked():
    for bad in ({"name": "x"}, "name", 3):
        with pytest.raises(ValueError, match="base_model must be"):
            made(base_model=bad)


def test_for_model():
    model = tiny("llama")
    before = torch.get_rng_state()
    one, two = (LayerRouters.for_model(model, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.w1, two.w1)
    assert (one.num_layers, one.hidden_size, one.router_size, one.windows) == (LAYERS, 32, 128, 8)
    assert one.base_model["name"] == "llama"
    one.bind(model)


def test_for_model_does_not_tell_where_the_model_lay(tmp_path):
    model = tiny("llama")
    for folder in (tmp_path, tmp_path / "gone" / "model-x"):
        model.name_or_path = str(folder)
        assert LayerRouters.for_model(model).base_model["name"] == folder.name
    model.name_or_path = "org/model"
    assert LayerRouters.for_model(model).base_model["name"] == "org/model"


# -- in a model -------------------------------------------------------------------------------------------------------
def test_bind_refuses_other_models():
    model = tiny("llama")
    routers = LayerRouters.for_model(model)
    routers.bind(model.to(torch.bfloat16))
    with pytest.raises(ValueError, match="for 4 layers of hidden size 32, the model has 3 of 32"):
        routers.bind(tiny("llama", num_hidden_layers=3))
    with pytest.raises(ValueError, match="for 4 layers of hidden size 32, the model has 4 of 64"):
        routers.bind(tiny("llama", hidden_size=64))
    other = tiny("llama", seed=1)
    with pytest.raises(ValueError, match="these routers are for 'llama'.*input embedding.*base_model = None"):
        routers.bind(other)
    routers.base_model = None
    routers.bind(other)


def test_a_model_is_unchanged_when_routers_do_not_fit():
    model, routers = tiny("llama"), LayerRouters.for_model(tiny("llama", seed=1))
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="these routers are for"):
        model.enable_dynamic_routing(routers)
    assert [type(m) for m in model.modules()] == classes


def test_routing_a_model():
    model = tiny("llama")
    keys = list(model.state_dict())
    routers = LayerRouters.for_model(model, generator=torch.Generator().manual_seed(0))
    inputs = padded(prompts([5, 12, 20]))
    with torch.no_grad():
        dense = model(**inputs).logits
        model.enable_dynamic_routing(routers)
        assert list(model.state_dict()) == keys and routers not in set(model.modules())
        routers.knob = 0.5
        torch.testing.assert_close(model(**inputs).logits[:, -1], dense[:, -1], atol=1e-4, rtol=1e-4)
        routers.knob = -0.5
        model(**inputs)
        plan = model.routing.plan
        assert plan.unique().numel() > 1
        # Layer 0 reads the embeddings, whatever the other layers do.
        rows = [model.model.embed_tokens(inputs["input_ids"][b, -n:]) for b, n in enumerate((5, 12, 20))]
        assert plan[:, 0].tolist() == [int(oracle(routers, 0, row).argmax()) for row in rows]
