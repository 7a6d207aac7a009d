"""Routed rows equal Hugging Face's own model whose stack is edited to the row's path, token for token."""

import pytest
import torch
from families import FAMILIES, LAYERS, prompts, tiny
from oracles import edited, greedy, padded

import drllm_fast  # noqa: F401  (sets model.enable_dynamic_routing)

# Layer 0 skipped; everything repeated; all-execute; one row alone in its blocks; a mixture.
PATHS = [[0, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 1], [0, 0, 2, 0], [1, 2, 0, 1]]
NEW = 6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_paths_equal_the_edited_stacks(family, side):
    model = tiny(family)
    rows = prompts([5, 11, 1, 9, 14])
    expected = [greedy(edited(model, path), row, NEW) for path, row in zip(PATHS, rows, strict=True)]
    dense = [greedy(model, row, NEW) for row in rows]
    model.enable_dynamic_routing(PATHS)
    batch = padded(rows, side)
    with torch.no_grad():
        out = model.generate(
            **batch, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    logits = torch.stack(out.logits, 1).float()
    for row, (tokens, scores) in enumerate(expected):
        assert out.sequences[row, batch["input_ids"].shape[1] :].tolist() == tokens.tolist(), f"row {row}"
        torch.testing.assert_close(logits[row], scores, atol=2e-3, rtol=0)
    # The comparison has teeth: paths other than all-execute are far from the dense model.
    for row in (0, 1, 3, 4):
        assert (logits[row, 0] - dense[row][1][0]).abs().max() > 0.05
    assert torch.equal(model.routing.plan, torch.tensor(PATHS, dtype=torch.int8))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_execute_equals_the_untouched_model(family):
    model = tiny(family)
    (row,) = prompts([13])
    tokens, scores = greedy(model, row, NEW)
    model.enable_dynamic_routing([1] * LAYERS)
    routed_tokens, routed_scores = greedy(model, row, NEW)
    assert routed_tokens.tolist() == tokens.tolist()
    torch.testing.assert_close(routed_scores, scores, atol=2e-3, rtol=0)
    model.disable_dynamic_routing()
    again_tokens, again_scores = greedy(model, row, NEW)
    assert torch.equal(again_tokens, tokens) and torch.equal(again_scores, scores)
