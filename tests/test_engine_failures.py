"""What an engine holds after something in it has failed, and after many budgets."""

import pytest
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
