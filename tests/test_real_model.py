"""Real weights, real text: SmolLM2-135M-Instruct, routed row by row, equals its edited stacks."""

import pytest
import torch
from oracles import edited, greedy

import drllm_fast  # noqa: F401
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
