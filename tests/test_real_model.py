"""Real weights, real text: SmolLM2-135M-Instruct, routed row by row, equals its edited stacks."""

import contextlib

import pytest
import torch
from oracles import edited, greedy

import drllm_fast
import drllm_fast.generation
from drllm_fast.smollm2 import load_smollm2

TEXTS = [
    "The capital of France is",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there. This is why",
    "Once upon a time there was a small lighthouse keeper who counted every ship that passed. One night",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
]
LAYERS, NEW = 30, 6


def path(**changes):
    out = [1] * LAYERS
    for layer, count in changes.items():
        out[int(layer[1:])] = count
    return out


PATHS = [path(), path(l19=0, l20=0), path(l7=0, l27=2), path(l0=2, l12=0, l13=0, l28=2, l29=2)]


@pytest.fixture(scope="module")
def loaded():
    return load_smollm2(torch.float32)


def test_real_prompts_in_one_batch_equal_their_edited_stacks(loaded):
    model, tokenizer = loaded
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    expected = []
    for row, layer_path in enumerate(PATHS):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        expected.append(greedy(edited(model, layer_path), ids, NEW))
    model.enable_dynamic_routing(PATHS)
    try:
        out = model.generate(
            **batch,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        model.disable_dynamic_routing()
    answers = tokenizer.batch_decode(out.sequences[:, batch["input_ids"].shape[1] :])
    logits = torch.stack(out.logits, 1)
    for row, (tokens, scores) in enumerate(expected):
        assert out.sequences[row, -NEW:].tolist() == tokens.tolist(), answers[row]
        # Logits reach about 20 here; fp32 through 30 blocks leaves 1e-4 of it.
        torch.testing.assert_close(logits[row], scores, atol=2e-3, rtol=0)
    assert "Paris" in answers[0]


LONGER = [
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is",
    " ".join(f"{n} times {n} is {n * n}." for n in range(2, 14)) + " 14 times 14 is",
    "To make tea, boil water, put the leaves into a pot,",
    " ".join(["Sheep may safely graze where a good shepherd watches."] * 4) + " This is a song about",
]


def test_the_engine_answers_real_prompts_as_each_alone(loaded):
    """Eight prompts at once, half of them on paths that the shipped routers choose, half on given ones."""
    model, tokenizer = loaded
    prompts = [tokenizer(text)["input_ids"] for text in [*TEXTS, *LONGER]]
    given = [None, PATHS[1], None, PATHS[3], None, None, PATHS[2], [1] * 18 + [0] * 6 + [1] * 6]
    new, expected = 12, []
    model.enable_dynamic_routing(drllm_fast.LayerRouters.from_pretrained("smollm2-135m-instruct"), budget=0.8)
    try:
        for prompt, own in zip(prompts, given, strict=True):
            with model.routing.using(own) if own else contextlib.nullcontext():
                out = model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                )
            expected.append((model.routing.plan[0].tolist(), out[0, len(prompt) :].tolist()))
        options = {"sampling": drllm_fast.generation.Sampling(new, ignore_eos=True), "max_batch": 5, "lookahead": 2}
        results = drllm_fast.generation.generate(
            model, tokenizer, prompts, paths=given, kv_tokens=60 * 140 * 3, **options
        )
    finally:
        model.disable_dynamic_routing()
    assert min(map(len, prompts)) <= 10 and max(map(len, prompts)) >= 100
    for result, (path, tokens) in zip(results, expected, strict=True):
        assert list(result.path) == path
        assert result.tokens == tokens, result.text
        assert result.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert len({result.path for result in results}) >= 5
