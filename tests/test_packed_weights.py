"""Linear layers while they are packed: what they compute, which are left alone, and what is left of it afterwards."""

import copy
import random

import pytest
import torch
from families import tiny
from generation_cases import Letters
from torch import nn

from drllm_fast import ops
from drllm_fast.generation import Engine, Sampling, calibration, generate
from drllm_fast.generation import engine as engine_module
from drllm_fast.generation.packed_weights import PackedLinear, linear_seconds, packable, packed
from drllm_fast.generation.sampling import choose_tokens

compiled = pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason=f"no extension: {ops.EXTENSION_ERROR}")


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_computes_what_it_did(dtype):
    model = tiny("qwen2", dtype=dtype)  # with biases
    ids = torch.arange(2, 40).view(2, 19)
    with torch.inference_mode():
        want = model(ids).logits
        before = {name: type(module) for name, module in model.named_modules()}
        layers = packable(model)
        assert {"q_proj", "down_proj", "lm_head"} <= {
            n.rpartition(".")[2] for n, m in model.named_modules() if m in layers
        }
        with packed(layers):
            assert all(type(layer) is PackedLinear for layer in layers)
            got = model(ids).logits
        assert torch.allclose(got, want, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.5)
        assert torch.equal(model(ids).logits, want)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any("_drllm_panels" in vars(module) for module in model.modules())


@compiled
def test_rows_of_a_packed_layer_do_not_depend_on_their_company():
    layer = nn.Linear(70, 90)
    x = torch.randn(40, 70)
    with torch.inference_mode(), packed([layer]):
        whole = layer(x)
        assert all(torch.equal(layer(x[i : i + n]), whole[i : i + n]) for i, n in ((0, 1), (3, 7), (20, 20)))


@compiled
def test_which_layers_are_left_alone():
    class Own(nn.Linear):
        pass

    plain = nn.Linear(4, 4)
    others = [Own(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4), nn.Linear(4, 4, device="meta"), nn.Linear(4, 4)]
    others[2].register_forward_hook(lambda *_: None)
    others[4].forward = lambda x: x
    assert packable(nn.ModuleList([plain, *others])) == [plain]


@compiled
def test_with_gradients_a_packed_layer_is_itself():
    layer, x = nn.Linear(6, 5), torch.randn(3, 6, requires_grad=True)
    with packed([layer]):
        layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, 6)) and layer.weight.grad is not None
    with torch.inference_mode(), packed([layer]):
        assert layer(x.detach().double().float()).dtype == torch.float32
        with pytest.raises(RuntimeError):  # torch's own error, for another dtype
            layer(x.detach().double())


@compiled
def test_a_failure_while_packing_leaves_no_layer_packed():
    good, bad = nn.Linear(4, 4), nn.Linear(4, 4)
    bad.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError), packed([good, bad]):
        pass
    assert type(good) is nn.Linear and type(bad) is nn.Linear and not hasattr(good, "_drllm_panels")


@compiled
def test_the_engine_packs_and_unpacks(monkeypatch):
    model = tiny("llama")
    rows, each = [[5, 9, 12], [3], [7] * 20], [Sampling(6)] * 3
    plain = generate(model, Letters(), rows, sampling=each, pack_weights=False)
    seen = []
    run = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: seen.append(x.shape) or run(self, x))
    fast = generate(model, Letters(), rows, sampling=each, pack_weights=True)
    assert seen and [r.tokens for r in fast] == [r.tokens for r in plain]
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    with pytest.raises(ValueError, match="nothing can be packed"):
        Engine(copy.deepcopy(model).double(), Letters(), pack_weights=True)


@compiled
@pytest.mark.parametrize("seconds", [(2.0, 1.0), (1.0, 2.0)])
def test_packing_where_it_was_measured_to_pay(seconds, monkeypatch, tmp_path):
    monkeypatch.setenv("DRLLM_FAST_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(calibration, "linear_seconds", lambda layers, rows: calls.append(rows) or seconds)
    for _ in range(2):  # the second time from the file
        assert Engine(tiny("llama"), Letters()).packs == (seconds[1] < seconds[0])
    assert calls == [8, 64]


@compiled
def test_seconds_are_those_of_all_layers():
    layers = [nn.Linear(64, 64) for _ in range(20)] + [nn.Linear(64, 128, bias=False)]
    plain, fast = linear_seconds(layers, 4)
    assert 0 < plain < 5 and 0 < fast < 5


@compiled
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "olmo2"])
def test_scores_of_a_packed_engine_do_not_depend_on_company_at_all(family, monkeypatch):
    """Bit for bit: products, attention and norms of a row are sums in an order of their own."""
    model = tiny(family)
    wild = random.Random(1)
    rows = [[wild.randrange(2, 97) for _ in range(n)] for n in (5, 19, 1, 40, 8, 3)]
    paths = [[1, 1, 1, 1], [1, 0, 2, 1], [1, 1, 1, 1], [0, 1, 1, 2], [1, 0, 2, 1], [1, 1, 0, 1]]
    seen: dict[tuple, torch.Tensor] = {}

    def choose(logits, samplings, numbers):
        for scores, sampling, number in zip(logits, samplings, numbers, strict=True):
            key = sampling.seed, number  # the seed says whose scores they are
            assert torch.equal(seen.setdefault(key, scores.clone()), scores), key
        return choose_tokens(logits, samplings, numbers)

    monkeypatch.setattr(engine_module, "choose_tokens", choose)
    each = [Sampling(12, seed=seed) for seed in range(len(rows))]
    for options in (
        {"max_batch": 1, "lookahead": 0, "max_prompt_tokens": 1},
        {"max_batch": 6, "lookahead": 0},
        {"max_batch": 2, "lookahead": 2, "max_prompt_tokens": 30},
    ):
        generate(model, Letters(), rows, sampling=each, paths=paths, pack_weights=True, **options)
    assert len(seen) == 12 * len(rows)
