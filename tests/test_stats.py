"""RoutingStats against sums written out by hand, and the executor's own counts on a tiny model."""

import pytest
import torch

import drllm_fast  # noqa: F401  (gives models enable_dynamic_routing)
from drllm_fast.stats import RoutingStats


def stats(**changes):
    """Two rows, three layers; layer 1 slides over 4 tokens."""
    given = dict(
        plan=torch.tensor([[1, 0, 2], [1, 1, 0]], dtype=torch.int8),
        tokens=torch.tensor([10, 3]),
        cached=torch.tensor([9, 3]),
        layer_rows=torch.tensor([2, 1, 2]),
        layer_tokens=torch.tensor([13, 3, 20]),
        kv_bytes_per_token=torch.tensor([8, 8, 16]),
        kv_window=torch.tensor([0, 4, 0]),
        forwards=5,
    )
    return RoutingStats(**{**given, **changes})


def test_visits_and_shares():
    s = stats()
    assert s.layers_run.tolist() == [3, 2] and s.layers_run.dtype == torch.int64
    assert s.visits.tolist() == [[10, 0, 20], [3, 3, 0]] and s.visits.dtype == torch.int64
    assert (s.visits_run, s.visits_dense) == (36, 39)
    assert s.share == pytest.approx(36 / 39)
    assert s.per_row.tolist() == pytest.approx([1.0, 2 / 3])
    assert s.per_layer.tolist() == pytest.approx([1.0, 3 / 13, 20 / 13])


def test_visits_run_is_what_was_counted_not_what_was_planned():
    assert stats(layer_tokens=torch.tensor([13, 3, 15])).visits_run == 31


def test_visits_do_not_overflow_the_plans_int8():
    s = stats(tokens=torch.tensor([1 << 40, 200]))
    assert s.visits[0].tolist() == [1 << 40, 0, 1 << 41]
    assert s.visits_dense == 3 * ((1 << 40) + 200)


def test_kv_bytes_respect_window_and_repeat():
    s = stats()
    # row 0: layer 0 9*8, layer 2 twice 9*16; row 1: layer 0 3*8, layer 1 min(3, 4)*8
    assert s.per_row_kv_bytes.tolist() == [72 + 288, 24 + 24]
    assert s.kv_bytes == 408
    # dense row 0: 9*8 + min(9, 4)*8 + 9*16; row 1: 3*8 + 3*8 + 3*16
    assert s.per_row_kv_bytes_dense.tolist() == [72 + 32 + 144, 24 + 24 + 48]
    assert s.kv_bytes_dense == 344


def test_a_layer_that_nobody_ran_still_counts_in_the_dense_model():
    plan = torch.tensor([[1, 0, 1], [1, 0, 1]], dtype=torch.int8)
    s = stats(plan=plan, kv_bytes_per_token=torch.tensor([8, 0, 8]), kv_window=torch.zeros(3, dtype=torch.int64))
    assert (s.kv_bytes, s.kv_bytes_dense) == (12 * 16, 12 * 24)


def test_nothing_cached_holds_nothing_on_either_side():
    s = stats(kv_bytes_per_token=torch.zeros(3, dtype=torch.int64), cached=torch.zeros(2, dtype=torch.int64))
    assert (s.kv_bytes, s.kv_bytes_dense) == (0, 0)


def test_frozen():
    with pytest.raises(AttributeError):
        stats().forwards = 1


def test_share_before_any_token_is_nan_not_an_error():
    s = stats(tokens=torch.zeros(2, dtype=torch.int64), layer_tokens=torch.zeros(3, dtype=torch.int64))
    assert s.share != s.share


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plan", torch.ones(3, dtype=torch.int8)),
        ("tokens", torch.ones(3, dtype=torch.int64)),
        ("cached", torch.ones(1, dtype=torch.int64)),
        ("layer_rows", torch.ones(2, dtype=torch.int64)),
        ("layer_tokens", torch.ones(2, 3, dtype=torch.int64)),
        ("kv_bytes_per_token", torch.ones(2, dtype=torch.int64)),
        ("kv_window", torch.ones(4, dtype=torch.int64)),
    ],
)
def test_shapes_that_do_not_belong_together(field, value):
    with pytest.raises(ValueError, match=field):
        stats(**{field: value})


def test_concat():
    one = stats()
    both = RoutingStats.concat([one, stats(kv_bytes_per_token=torch.tensor([8, 0, 16]), forwards=2)])
    assert both.plan.shape == (4, 3) and both.forwards == 7
    assert both.kv_bytes_per_token.tolist() == [8, 8, 16]
    assert (both.visits_run, both.visits_dense) == (72, 78)
    assert both.kv_bytes == 2 * one.kv_bytes and both.share == pytest.approx(one.share)
    with pytest.raises(ValueError, match="no batch"):
        RoutingStats.concat([])


def test_the_executors_counts_agree_with_the_plan():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    plan = [[1, 0, 2], [1, 1, 1]]
    model.enable_dynamic_routing(plan)
    ids = torch.randint(1, 64, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    s = model.routing.stats
    assert s.plan.tolist() == plan and s.forwards == 5
    assert s.tokens.tolist() == [4 + 4, 6 + 4]  # the last token is chosen and not run
    assert s.cached.tolist() == s.tokens.tolist()
    assert s.layer_rows.tolist() == [2 * 5, 1 * 5, 3 * 5]
    assert s.layer_tokens.tolist() == s.visits.sum(0).tolist()
    assert s.kv_bytes_per_token.tolist() == [2 * 2 * 8 * 4] * 3  # K and V, 2 heads of 8, fp32
    assert s.kv_bytes == (8 * 3 + 10 * 3) * 128
