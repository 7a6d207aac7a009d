"""What an engine holds after something in it has failed, and after many budgets."""

import random

import pytest
import torch
from cli_cases import byte_tokenizer
from families import LAYERS, tiny

from drllm_fast import StaticPolicy
from drllm_fast.generation import Engine, Sampling
from drllm_fast.generation.engine import MAX_POLICIES


def model():
    return tiny("llama", vocab_size=258, pad_token_id=1, bos_token_id=None)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_first_token_that_fails_gives_all_spans_back(monkeypatch, which):
    with Engine(model(), byte_tokenizer(), kv_tokens=10_000) as engine:
        requests = [engine.submit(text, Sampling(max_new_tokens=5)) for text in ("one", "two", "three")]
        take = engine._take

        def failing(request, token):
            if request is requests[which]:
                raise RuntimeError("boom")
            return take(request, token)

        monkeypatch.setattr(engine, "_take", failing)
        with pytest.raises(RuntimeError, match="boom"):
            engine.step()
        assert [request.finish_reason for request in requests] == ["error"] * 3
        assert engine.pool.used == 0 and engine.pool.largest == 10_000 and not engine.busy

        monkeypatch.undo()
        engine.submit("again", Sampling(max_new_tokens=3))
        while engine.busy:
            deltas = engine.step()
        assert deltas[-1].result.finish_reason == "length" and engine.pool.used == 0


def test_keys_that_cannot_be_written_give_all_spans_back(monkeypatch):
    with Engine(model(), byte_tokenizer(), kv_tokens=10_000) as engine:
        requests = [engine.submit(text, Sampling(max_new_tokens=5)) for text in ("one", "two", "three")]

        def failing(*_):
            raise RuntimeError("boom")

        monkeypatch.setattr(engine.pool, "write", failing)
        with pytest.raises(RuntimeError, match="boom"):
            engine.step()
        assert [request.finish_reason for request in requests] == ["error"] * 3
        assert engine.pool.used == 0 and engine.pool.largest == 10_000 and not engine.busy


class Random:
    """Paths of no or all visits, repeats among them, for which a policy may ask; two visits a block are its bound."""

    def __init__(self):
        self.random = random.Random(0)

    def route(self, layer, prompts):
        rows = len(prompts.cu_seqlens) - 1
        return torch.tensor([self.random.choices((0, 1, 2), (8, 40, 1))[0] for _ in range(rows)])


def test_rows_lie_at_the_begin_of_the_pool(monkeypatch):
    """What a path might have needed and does not is never written, or hundreds of rows would touch all of the pool."""
    routed = model().enable_dynamic_routing(Random())
    wild = random.Random(1)
    with Engine(routed, byte_tokenizer(), max_batch=8, lookahead=8, kv_tokens=100_000) as engine:
        written, write = [0], engine.pool.write

        def noting(index, keys, values):
            written.append(int(index.max()))
            write(index, keys, values)

        monkeypatch.setattr(engine.pool, "write", noting)
        for _ in range(300):
            prompt = [wild.randrange(2, 258) for _ in range(wild.randrange(1, 40))]
            engine.submit(prompt, Sampling(max_new_tokens=wild.randrange(1, 8), ignore_eos=True))
        while engine.busy:
            engine.step()
        assert engine.pool.used == 0
        assert max(written) < 1.5 * engine.pool.peak  # what first places leave between them


def test_budgets_that_never_come_again_are_not_kept():
    routed = model().enable_dynamic_routing(StaticPolicy([1, 2, 0], num_layers=LAYERS, budget=0.75))
    with Engine(routed, byte_tokenizer()) as engine:
        paths = set()
        for number in range(2 * MAX_POLICIES):
            budget = 0.3 + 0.7 * number / (2 * MAX_POLICIES)
            request = engine.submit("Hello", Sampling(max_new_tokens=1), budget=budget)
            assert len(engine._policies) <= MAX_POLICIES
            if number % 16 == 0:
                while engine.busy:
                    paths |= {delta.result.path for delta in engine.step()}
            assert request.policy.budget == budget
        assert len(paths) == 4  # of one to four layers
