"""The evaluator against Hugging Face's own model with an edited stack of layers."""

import random

import pytest
import torch
from characters import Characters
from families import FAMILIES, LAYERS, tiny
from oracles import edited, greedy

from drllm_fast.search import PathEvaluator

TOKENIZER = Characters()
STORES = {"on": 1 << 30, "off": 0, "tiny": 3 * 20 * 32 * 4}
CONTEXT, CHOICES = "Which way is up?", [" north", " no", " north by north", " a balloon"]


def some_paths(count, layers=LAYERS, seed=0):
    rng = random.Random(seed)
    paths = [tuple(rng.choice((0, 1, 1, 2)) for _ in range(layers)) for _ in range(count)]
    return [(1,) * layers, *paths, (0,) * layers, (2,) * layers, paths[0]]


@torch.no_grad()
def one_by_one(model, context, choices, paths):
    """[P, C]: each choice and path a forward of its own."""
    rows = []
    for path in paths:
        alone, row = edited(model, path), []
        for choice in choices:
            before, after = TOKENIZER.encode(context), TOKENIZER.encode(choice)
            ids = torch.tensor([before + after])
            logits = alone(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            row.append(sum(float(logits[len(before) - 1 + i, t]) for i, t in enumerate(after)))
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_edited_stacks(family):
    model, paths = tiny(family), some_paths(5)
    expected = one_by_one(model, CONTEXT, CHOICES, paths)
    assert expected.std(0).min() > 0.05  # paths are told apart
    for name, size in STORES.items():
        evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size)
        for _ in range(2):  # the second time from the store
            scores = evaluator.score_choices(CONTEXT, CHOICES, paths)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, expected, atol=5e-4, rtol=0, msg=lambda m, n=name: f"store {n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_those_of_edited_stacks(family):
    model, paths, new = tiny(family), some_paths(4), 9
    requests = [("Which way is up?", paths), ("A", paths[1:4]), ("Half of the moon", paths[:2])]
    expected = [
        [greedy(edited(model, path), torch.tensor(TOKENIZER.encode(prompt)), new)[0].tolist() for path in own]
        for prompt, own in requests
    ]
    for size in STORES.values():
        evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size)
        for _ in range(2):
            assert evaluator.greedy_many(requests, new) == expected


def test_a_prompt_asked_twice_is_run_once():
    model, paths = tiny("llama"), some_paths(3)
    evaluator = PathEvaluator(model, TOKENIZER)
    once = evaluator.score_choices(CONTEXT, CHOICES, paths)
    visits = evaluator.stats.visits
    evaluator = PathEvaluator(model, TOKENIZER)
    first, second = evaluator.score_many([(CONTEXT, CHOICES, paths), (CONTEXT, CHOICES, paths[::-1])])
    assert torch.equal(first, once) and torch.equal(second, once.flip(0))
    assert evaluator.stats.visits == visits
    again, _ = evaluator.score_many([(CONTEXT, CHOICES, paths), (CONTEXT, CHOICES, paths[:2])])
    torch.testing.assert_close(again, once)
    assert evaluator.stats.visits == visits  # all of it came from the store


def distinct_visits(paths, known=frozenset()):
    """How many block visits a tree of paths needs beyond those whose result is among the `known` prefixes."""
    passes = set()
    for path in paths:
        for layer, times in enumerate(path):
            if path[: layer + 1] not in known:
                passes |= {(path[:layer], number) for number in range(times)}
    return len(passes)


def test_what_paths_share_is_run_once():
    paths = some_paths(8, seed=3)
    evaluator = PathEvaluator(tiny("llama"), TOKENIZER)
    evaluator.score_choices(CONTEXT, CHOICES, paths)
    assert evaluator.stats.visits == distinct_visits(paths)
    assert evaluator.stats.visits_alone == sum(map(sum, set(paths)))
    known = {path[:depth] for path in paths for depth in range(LAYERS + 1)}
    more = some_paths(8, seed=4)
    evaluator.score_choices(CONTEXT, CHOICES, more)
    assert evaluator.stats.visits == distinct_visits(paths) + distinct_visits(more, known)


def test_small_forwards_give_the_same():
    model, paths = tiny("gemma2"), some_paths(6)
    requests = [(CONTEXT, CHOICES, paths), ("Up?", [" A", " B"], paths[:3]), ("", ["No one knows"], paths[2:])]
    expected = PathEvaluator(model, TOKENIZER).score_many(requests)
    for limits in ({"max_tokens": 1}, {"max_tokens": 100}, {"max_logits": 1}, {"max_logits": 20_000}):
        for size in STORES.values():
            evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size, **limits)
            for scores, right in zip(evaluator.score_many(requests), expected, strict=True):
                torch.testing.assert_close(scores, right, atol=1e-4, rtol=0)
    assert len(expected[2][0]) == 1


def test_the_store_keeps_to_its_size_and_drops_descendants_first():
    model = tiny("llama")
    for size in (1, 2_000, 20_000, 60_000):
        evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size)
        for seed in range(6):
            evaluator.greedy_many([("Which way?", some_paths(5, seed=seed)), (f"Or {seed}", some_paths(2))], 2)
            evaluator.score_choices(CONTEXT, CHOICES, some_paths(3, seed=seed))
            store = evaluator.store
            assert store.bytes == sum(prefix.bytes() for prefix in store._kept.values()) <= size
            for (prompt, path), prefix in store._kept.items():
                assert len(path) == 1 or store._kept[prompt, path[:-1]] is prefix.parent
                assert prefix.hidden.untyped_storage().nbytes() == prefix.hidden.nbytes  # no view of a forward's tensor
    assert len(store)
    for prompt in ("Which way?", *(f"Or {seed}" for seed in range(6))):
        evaluator.forget(prompt)
    evaluator.forget(CONTEXT, CHOICES)
    assert len(store) == store.bytes == 0


@torch.no_grad()
def test_divergence():
    model, paths = tiny("qwen3"), some_paths(4)
    ids, start = torch.tensor([TOKENIZER.encode(CONTEXT + CHOICES[2])]), len(CONTEXT) - 1
    own = [edited(model, path)(input_ids=ids, use_cache=False).logits[0, start:-1] for path in paths]
    dense = own[0].log_softmax(-1)
    expected = torch.stack([(dense.exp() * (dense - logits.log_softmax(-1))).sum(-1).mean() for logits in own])
    for size in STORES.values():
        evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size)
        found = evaluator.divergence(CONTEXT, CHOICES[2:3], paths)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found[0].abs() < 1e-6 and found[1:].max() > 0.1


def test_the_model_is_left_as_it_was():
    model, paths = tiny("llama"), some_paths(3)
    model.train()
    kinds = [type(module) for module in model.modules()]
    ids = torch.tensor([TOKENIZER.encode(CONTEXT)])
    before = model(input_ids=ids).logits
    expected = PathEvaluator(model, TOKENIZER).score_choices(CONTEXT, CHOICES, paths)
    assert [type(module) for module in model.modules()] == kinds and model.training
    assert torch.equal(model(input_ids=ids).logits, before)

    model.enable_dynamic_routing([1, 0, 1, 2])  # which is not what the evaluator asks
    model(input_ids=ids)
    plan = model.routing.plan
    evaluator = PathEvaluator(model, TOKENIZER)
    with model.routing.disabled():
        torch.testing.assert_close(evaluator.score_choices(CONTEXT, CHOICES, paths), expected)
        evaluator.greedy(CONTEXT, paths, 3)
    with model.routing.using([1, 1, 1, 0]):
        torch.testing.assert_close(evaluator.score_choices(CONTEXT, CHOICES, paths), expected)
        evaluator.greedy(CONTEXT, paths, 3)
    assert torch.equal(model.routing.plan, plan)
    with pytest.raises(ValueError, match="entries"):
        evaluator.score_choices(CONTEXT, CHOICES, [[1, 1, 1]])
    model(input_ids=ids)
    assert torch.equal(model.routing.plan, plan)


def test_answers_end_where_they_should():
    model, paths = tiny("llama"), some_paths(3)
    evaluator = PathEvaluator(model, TOKENIZER)
    whole = evaluator.greedy(CONTEXT, paths, 8)
    assert [len(answer) for answer in whole] == [8] * len(paths)
    end = whole[0][3]
    model.generation_config.eos_token_id = [end]
    cut = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert evaluator.greedy(CONTEXT, paths, 8) == cut and len({len(a) for a in cut}) > 1
    model.generation_config.eos_token_id = None
    stop = TOKENIZER.decode(whole[0][2:4])
    ends = [TOKENIZER.decode(answer).find(stop) for answer in whole]
    cut = [answer if at < 0 else answer[: at + len(stop)] for answer, at in zip(whole, ends, strict=True)]
    assert evaluator.greedy(CONTEXT, paths, 8, stop=[stop]) == cut and ends[0] >= 0
    assert evaluator.greedy(CONTEXT, paths, 1) == [answer[:1] for answer in whole]


def test_refusals():
    evaluator = PathEvaluator(tiny("llama"), TOKENIZER)
    path = [1] * LAYERS
    with pytest.raises(ValueError, match="list of one or more texts"):
        evaluator.score_choices(CONTEXT, " north", path)
    with pytest.raises(ValueError, match="list of one or more texts"):
        evaluator.score_choices(CONTEXT, [], path)
    with pytest.raises(ValueError, match="no tokens of its own"):
        evaluator.score_choices(CONTEXT, [" a", ""], path)
    with pytest.raises(ValueError, match="values from 0 to 3"):
        evaluator.score_choices(CONTEXT, CHOICES, [[1, 3, 0, 1]])
    with pytest.raises(ValueError, match="exceeds the model's 256 positions"):
        evaluator.score_choices("x" * 255, [" yes"], path)
    evaluator.score_choices("x" * 254, [" y"], path)
    evaluator.greedy("x" * 250, path, 6)
    with pytest.raises(ValueError, match="250 tokens and 7 of its answer exceeds"):
        evaluator.greedy("x" * 250, path, 7)
    with pytest.raises(ValueError, match="max_new_tokens"):
        evaluator.greedy("x", path, 0)
    with pytest.raises(ValueError, match="store_bytes|max_bytes"):
        PathEvaluator(tiny("llama"), TOKENIZER, store_bytes=-1)
