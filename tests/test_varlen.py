"""Attention by torch's varlen_attn: what it is asked for, in each form its signature has had, by a stand-in that
computes what its documentation says in plain torch. Results equal the fp64 loops of `attention_cases`."""

import pytest
import torch
from attention_cases import eager, inputs, oracle
from torch.nn.attention import varlen as torch_varlen

from drllm_fast import varlen

DTYPE = torch.bfloat16
NEW = [5, 0, 1, 11]


def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, left, right, enable_gqa):
    """A query of a row sees the keys from `left` before it to `right` after it, all on a side that is -1."""
    assert query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0)
    assert max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
    assert {t.dtype for t in (cu_seq_q, cu_seq_k)} == {torch.int32}
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    out = torch.empty_like(query)
    for (a, b), (c, d) in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist(), strict=True):
        distance = torch.arange(d - c) - torch.arange(b - a)[:, None] - ((d - c) - (b - a))
        seen = ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))
        q, k, v = (t.float().transpose(0, 1) for t in (query[a:b], key[c:d], value[c:d]))
        scores = (q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)).masked_fill(
            ~seen, -torch.inf
        )
        out[a:b] = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
    return out


def causal_only(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    right = 0 if is_causal else -1
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, None, -1, right, False)


def with_scale(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
    right = 0 if is_causal else -1
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, -1, right, False)


def with_window(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):  # fmt: skip
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, *window_size, False)


def with_gqa(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, *window_size, enable_gqa)


# Those that have the argument that a case needs, of these four forms and of none.
FORMS = [causal_only, with_scale, with_window, with_gqa]
CASES = {
    "plain": ((2, 2), {}, FORMS),
    "scale": ((2, 2), {"scale": 0.3}, FORMS[1:]),
    "window": ((2, 2), {"window": 3}, FORMS[2:]),
    "window 1": ((2, 2), {"window": 1}, FORMS[2:]),
    "window of all but one": ((2, 2), {"window": max(NEW) - 1}, FORMS[2:]),
    "window of all": ((2, 2), {"window": max(NEW)}, FORMS),
    "groups": ((6, 2), {}, FORMS[3:]),
    "groups, scale and window": ((6, 2), {"scale": 0.3, "window": 4}, FORMS[3:]),
    "softcap": ((2, 2), {"softcap": 0.8}, []),
    "sinks": ((2, 2), {"sinks": torch.zeros(2)}, []),
}


@pytest.fixture
def offered(monkeypatch):
    def offer(form):
        if form is None:
            monkeypatch.delattr(torch_varlen, "varlen_attn")
        else:
            monkeypatch.setattr(torch_varlen, "varlen_attn", form)
        varlen.parameters.cache_clear()

    yield offer
    monkeypatch.undo()
    varlen.parameters.cache_clear()


@pytest.mark.parametrize("form", [None, *FORMS], ids=lambda form: getattr(form, "__name__", "none"))
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loops_in_fp64(offered, case, form):
    heads, given, takes = CASES[case]
    offered(form)
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(3):
        query, keys, values, starts = inputs(NEW, NEW, heads, dtype=DTYPE, gap=0, seed=seed, layout="tokens first")
        cu_seqlens = torch.tensor([0, *torch.tensor(NEW).cumsum(0)], dtype=torch.int32)
        packed = (query[0].transpose(0, 1).contiguous(), keys[0, :, 1:], values[0, :, 1:])  # one NaN lies before them
        scale = given.get("scale", 8**-0.5)
        rest = {name: x for name, x in given.items() if name != "scale"}
        offers = varlen.offers(*packed, max(NEW), scale, **rest)
        assert offers == (form in takes)
        if offers:
            arguments = (query, keys, values, NEW, starts, NEW)
            expected = oracle(*arguments, **given)
            out = varlen.packed_attention(*packed, cu_seqlens, max(NEW), scale, **rest)
            assert out.is_contiguous() and out.dtype == DTYPE
            errors = torch.maximum(
                errors, torch.stack([(x - expected).abs().max() for x in (out, eager(*arguments, **given))])
            )
    assert errors[0] <= 2 * errors[1]


def test_what_flash_attention_cannot_read(offered):
    offered(with_gqa)

    def offers(dim=8, dim_v=8, dtype=DTYPE, cut=slice(None), tokens=9):
        query, keys, values = (torch.zeros(n, tokens, d, dtype=dtype) for n, d in ((4, dim), (2, dim), (2, dim_v)))
        return varlen.offers(query.transpose(0, 1), keys[..., cut], values, 9, 0.5)

    assert offers() and offers(dtype=torch.float16) and offers(256, 256)
    assert not offers(dtype=torch.float32) and not offers(264, 264) and not offers(12, 12) and not offers(8, 16)
    assert not offers(tokens=0)
    query, keys, values = (torch.zeros(9, n, 12, dtype=DTYPE)[..., :8] for n in (4, 2, 2))  # rows of 24 bytes
    assert not varlen.offers(query, keys.transpose(0, 1), values.transpose(0, 1), 9, 0.5)
    flat = torch.zeros(2 * 9 * 8 + 1, dtype=DTYPE)
    assert not varlen.offers(*(t.view(2, 9, 8) for t in (flat[1:], flat[:-1], flat[:-1])), 9, 0.5)
    assert not varlen.offers(*(torch.zeros(2, 2, 16, dtype=DTYPE)[..., ::2] for _ in range(3)), 9, 0.5)


def test_the_installed_torch():
    """Whether this torch's varlen_attn still has the arguments that are looked for."""
    takes = varlen.parameters()
    assert {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"} <= takes
    assert {"window_size", "is_causal"} & takes
