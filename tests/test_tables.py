"""Tables: every tensor comes back as it was made, and what was announced travels with the first that is asked for."""

import pytest
import torch

from drllm_fast.tables import ALIGNED, Tables

CPU, META = torch.device("cpu"), torch.device("meta")
MADE = {("a",): torch.arange(3), ("b", 1): torch.tensor([5, 6, 7, 8, 9], dtype=torch.int32), ("c",): torch.arange(0)}


def test_what_was_announced_is_made_once():
    tables, calls = Tables(), []

    def make(key):
        return lambda: calls.append(key) or MADE[key]

    for key in [*MADE, *MADE]:
        tables.add(key, make(key))
    for key, made in MADE.items():
        assert tables.get(key, make(key), CPU) is made
    assert tables.get(("d",), lambda: torch.ones(1), CPU).tolist() == [1] and calls == [*MADE]


@pytest.mark.parametrize("announced", [False, True])
def test_values_survive_the_way_to_a_device(monkeypatch, announced):
    # A device of the CPU's own memory: bytes are staged as for any other.
    sent, tables, there = [], Tables(), {}
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: sent.append((a, k, len(t))) or to(t.clone(), "cpu"))
    for key, made in MADE.items():
        tables.add(key, lambda made=made: made)
        if not announced:
            tables._send(META, there)
    if announced:
        tables._send(META, there)
    # 24, 20 and 0 bytes, aligned; what is there is not sent again
    assert sent == [((META,), {"non_blocking": True}, size) for size in ([64] if announced else [32, 32, 0])]
    for key, made in MADE.items():
        assert torch.equal(there[key], made) and there[key].dtype == made.dtype
        assert there[key].storage_offset() * made.element_size() % ALIGNED == 0


def test_each_device_gets_everything_at_once():
    tables = Tables()
    for key, made in MADE.items():
        tables.add(key, lambda made=made: made)
    got = [tables.get(key, None, META) for key in MADE]
    assert len({t.untyped_storage()._cdata for t in got}) == 1
    assert [t.shape for t in got] == [m.shape for m in MADE.values()]
