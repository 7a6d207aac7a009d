"""`model.routing`: what was run is what is told, and what is decided is decided on the prompt alone."""

import copy

import numpy
import pytest
import torch
from families import LAYERS, prompts, tiny
from oracles import edited, padded

import drllm_fast  # noqa: F401
from drllm_fast import PromptBatch, StaticPolicy

PATHS = [[0, 1, 1, 1], [1, 2, 0, 1], [2, 0, 2, 2]]


# The example of the README: a policy in ten lines.
class SkipLateBlocksOfShortPrompts:
    def route(self, layer: int, prompts: PromptBatch) -> torch.Tensor:
        lengths = prompts.cu_seqlens.diff()  # tokens of each prompt
        decisions = torch.ones_like(lengths)  # run every block once ...
        if layer in (2, 3):
            decisions[lengths < 8] = 0  # ... but not these two for short prompts
        return decisions


def test_the_readme_policy():
    model = tiny("llama").enable_dynamic_routing(SkipLateBlocksOfShortPrompts())
    model(**padded(prompts([4, 8, 12])))
    assert model.routing.plan.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_stats_count_what_ran():
    model = tiny("llama")
    lengths, new = [5, 11, 8], 4
    model.enable_dynamic_routing(PATHS)
    with pytest.raises(RuntimeError, match="no prompt"):
        model.routing.stats  # noqa: B018
    ran = torch.zeros(LAYERS, dtype=torch.int64)

    def count(layer):
        def hook(module, args, output):
            ran[layer] += args[0].shape[1]

        return hook

    # An oracle of its own: count the tokens that reach each block's MLP.
    hooks = [layer.mlp.register_forward_hook(count(i)) for i, layer in enumerate(model.model.layers)]
    out = model.generate(
        **padded(prompts(lengths)),
        max_new_tokens=new,
        min_new_tokens=new,
        return_dict_in_generate=True,
        do_sample=False,
    )
    for hook in hooks:
        hook.remove()
    stats, tokens = model.routing.stats, torch.tensor(lengths) + new - 1  # the last token is never run
    plan = torch.tensor(PATHS)
    assert torch.equal(stats.tokens, tokens) and torch.equal(stats.cached, tokens)
    assert torch.equal(stats.layer_tokens, ran)
    assert torch.equal(stats.visits, plan * tokens.unsqueeze(1))
    assert torch.equal(stats.layer_tokens, stats.visits.sum(0))
    assert torch.equal(stats.layer_rows, plan.sum(0) * new)
    assert stats.visits_dense == int(tokens.sum()) * LAYERS
    assert stats.visits_run == int((plan * tokens.unsqueeze(1)).sum())
    per_token = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 in fp32
    assert stats.kv_bytes == stats.visits_run * per_token
    assert stats.kv_bytes == out.past_key_values.kv_bytes()
    assert stats.kv_bytes_dense == stats.visits_dense * per_token
    assert out.past_key_values.kv_bytes(allocated=True) >= stats.kv_bytes


def test_kv_bytes_with_a_sliding_window():
    model = tiny("mistral").enable_dynamic_routing([1, 2, 0, 1])
    out = model.generate(prompts([30])[0][None], max_new_tokens=80, min_new_tokens=80, return_dict_in_generate=True)
    stats = model.routing.stats
    # What lies outside the window goes when a slot grows, so what is held stays bounded while tokens do not.
    assert stats.cached.tolist() == [109]
    assert stats.kv_bytes == 4 * 7 * 128
    assert out.past_key_values.kv_bytes(allocated=True) < 4 * 109 * 128


def test_context_routes_on_the_context_alone():
    """Answer choices after one context are scored by one network, whatever they say."""

    class BySum:
        def route(self, layer, prompts):
            bounds = prompts.cu_seqlens.tolist()
            sums = [prompts.hidden[a:b].sum() for a, b in zip(bounds, bounds[1:], strict=False)]
            return (torch.stack(sums) > 0).long() + (layer == 1)

    model = tiny("llama")
    context, answers = prompts([6])[0], prompts([1, 3, 5], seed=7)
    model.enable_dynamic_routing(BySum())
    model(context[None])
    (path,) = model.routing.plan.tolist()
    rows = [torch.cat([context, answer]) for answer in answers]
    batch = padded(rows)
    with model.routing.context([6, 6, 6]):
        logits = model(**batch).logits
    assert model.routing.plan.tolist() == [path] * 3
    stack = edited(model.disable_dynamic_routing(), path)
    for r, row in enumerate(rows):
        torch.testing.assert_close(logits[r, -len(row) :], stack(row[None]).logits[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_order_and_padding_change_no_decision(side):
    class BySign:
        def route(self, layer, prompts):
            rows = zip(prompts.cu_seqlens[:-1].tolist(), prompts.cu_seqlens[1:].tolist(), strict=True)
            return torch.tensor([int(prompts.hidden[a:b, layer].sum() > 0) * 2 for a, b in rows])

    model, rows = tiny("llama").enable_dynamic_routing(BySign()), prompts([3, 9, 5, 12])
    alone = []
    for row in rows:
        model(row[None])
        alone += model.routing.plan.tolist()
    assert len({tuple(p) for p in alone}) > 1
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        model(**padded([rows[i] for i in order], side))
        assert model.routing.plan.tolist() == [alone[i] for i in order]


def test_a_policy_may_fix_whole_paths_and_is_not_asked_again():
    class Upfront:
        asked = 0

        def route(self, layer, prompts):
            self.asked += 1
            if layer == 0:
                return torch.ones(len(prompts.cu_seqlens) - 1, dtype=torch.int8)
            return torch.tensor([[9 % 2, 0, 2, 1]] * (len(prompts.cu_seqlens) - 1))

    policy = Upfront()
    model = tiny("llama").enable_dynamic_routing(policy)
    model(**padded(prompts([3, 4])))
    assert policy.asked == 2
    assert model.routing.plan.tolist() == [[1, 0, 2, 1]] * 2


def test_using_changes_paths_inside_and_only_there():
    model = tiny("llama").enable_dynamic_routing([1] * LAYERS)
    row = prompts([7])[0][None]
    with model.routing.using([0, 1, 1, 1]):
        model(row)
        assert model.routing.plan.tolist() == [[0, 1, 1, 1]]
        with model.routing.using([1, 1, 2, 1]):
            model(row)
            assert model.routing.plan.tolist() == [[1, 1, 2, 1]]
    model(row)
    assert model.routing.plan.tolist() == [[1] * LAYERS]


def test_the_innermost_of_using_and_disabled_holds():
    model = tiny("llama").enable_dynamic_routing([1] * LAYERS)
    row = prompts([7])[0][None]
    with torch.no_grad():
        with model.routing.disabled():
            dense = model(row).logits
        with model.routing.disabled(), model.routing.using([0, 1, 1, 1]):
            assert not torch.allclose(model(row).logits, dense, atol=1e-3)
        with model.routing.using([0, 1, 1, 1]), model.routing.disabled():
            assert torch.equal(model(row).logits, dense)


def test_setting_the_policy():
    model = tiny("llama").enable_dynamic_routing([1] * LAYERS)
    model.routing.policy = numpy.array([1, 0, 1, 2])
    model(prompts([7])[0][None])
    assert model.routing.plan.tolist() == [[1, 0, 1, 2]]
    with pytest.raises(ValueError, match="3 entries"):
        model.routing.policy = [1, 1, 1]
    with pytest.raises(TypeError, match="not a policy"):
        model.routing.policy = None


def test_a_static_policy_by_its_file(tmp_path):
    StaticPolicy(order=(2, 1), num_layers=4, budget=0.75).save(tmp_path / "static.json")
    model = tiny("llama").enable_dynamic_routing(tmp_path / "static.json", budget=0.5)
    model(prompts([7])[0][None])
    assert model.routing.plan.tolist() == [[1, 0, 0, 1]]


def test_forwards_inside_generate_that_are_not_its_own():
    """A logits processor that calls the model itself: its prompt is its own, as are its positions."""
    model, other = tiny("llama"), prompts([12], seed=5)[0][None]
    positions = torch.arange(12)[None] * 2
    mask = torch.ones_like(other)
    seen, results = [], []

    class Lengths:
        def route(self, layer, prompts):
            seen.append(prompts.cu_seqlens.diff().tolist())
            return torch.ones(len(prompts.cu_seqlens) - 1, dtype=torch.int8)

    def processor(ids, scores):
        results.append(model(other, attention_mask=mask, position_ids=positions, use_cache=False).logits)
        return scores

    model.enable_dynamic_routing(Lengths())
    with torch.no_grad():
        expected = model(other, attention_mask=mask, position_ids=positions, use_cache=False).logits
        seen.clear()
        model.generate(prompts([5])[0][None], max_new_tokens=2, logits_processor=[processor], do_sample=False)
    assert seen == [[5]] * LAYERS + [[12]] * LAYERS * 2
    assert all(torch.equal(r, expected) for r in results)


def test_summary_and_plot(tmp_path):
    model = tiny("llama").enable_dynamic_routing(PATHS)
    model(**padded(prompts([5, 11, 8])))
    assert "11" in model.routing.summary()
    model.routing.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert "GivenPlan" in repr(model.routing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_autocast(family, dtype):
    """Rotary embeddings leave queries and keys in fp32 there, and values are not: torch's own attention casts them."""
    dense = tiny(family).eval()
    routed = copy.deepcopy(dense).enable_dynamic_routing([[1, 0, 1, 2], [1] * LAYERS])
    ids = torch.stack(prompts([7, 7]))
    edits = [edited(dense, path) for path in routed.routing.policy.plan.tolist()]
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        out = routed(ids, use_cache=True)
        step = routed(ids[:, :1], past_key_values=out.past_key_values).logits
        for row, model in enumerate(edits):
            own = model(ids[row : row + 1], use_cache=True)
            again = model(ids[row : row + 1, :1], past_key_values=own.past_key_values).logits
            for got, expected in ((out.logits[row], own.logits[0]), (step[row], again[0])):
                assert got.dtype == expected.dtype and (got - expected).abs().max() <= 0.1


def test_tables_stay_on_the_host_whatever_the_default_device_is():
    model = tiny("llama").eval().enable_dynamic_routing([[1, 0, 1, 2], [0, 1, 2, 1], [1, 1, 0, 1]])
    ids, mask = torch.stack(prompts([7] * 3)), torch.ones(3, 7, dtype=torch.int64)
    mask[1, :3] = 0

    def steps():
        out = model(ids, attention_mask=mask, use_cache=True)
        cache = out.past_key_values
        cache.reorder_cache(torch.tensor([2, 0, 1], device="cpu"))
        wider = torch.cat([mask[[2, 0, 1]], mask[:, -1:]], 1)
        return out.logits, model(ids[:, :1], attention_mask=wider, past_key_values=cache).logits

    with torch.no_grad():
        expected = steps()
        with torch.device("meta"):  # stands in for a GPU: nothing on it could be read
            got = steps()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
