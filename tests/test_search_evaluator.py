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
