"""Routed rows equal Hugging Face's own model whose stack is edited to the row's path, token for token."""

import contextlib

import pytest
import torch
from families import COMMON, FAMILIES, LAYERS, MOE, prompts, randomise, tiny
from oracles import edited, greedy, padded
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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


# Families that a uniform tiny config can build and that were found exact, beside those above.
ALSO_EXACT = set(
    "apertus arcee biogpt bitnet cohere cwm ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma glm glm4_moe granitemoe "
    "granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe jais2 minimax_m2 ministral nanochat nemotron olmo olmo3 "
    "olmoe opt persimmon phi phimoe qwen2_moe seed_oss stablelm vaultgemma".split()
)


@pytest.mark.parametrize("family", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES)))
def test_every_other_family_is_exact_or_refused(family):
    """Every family that can be judged is refused, or equals its edited stacks. (A family that no uniform tiny config
    can build, or whose edited stack Hugging Face cannot run, is not judged: nothing is shown for it.)"""
    model = uniform(family)
    result = "not judged" if model is None else judged(model)
    assert result == "exact" or (result in ("refused", "not judged") and family not in ALSO_EXACT), result


def uniform(family):
    for extra in ({**MOE, "head_dim": 8, "num_layers": 4, "n_layer": 4}, {}):
        with contextlib.suppress(Exception):  # whatever a config does not like
            config = AutoConfig.for_model(family, **COMMON, **extra)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size < 10_000_000:
                torch.manual_seed(0)
                return randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    return None


def judged(model) -> str:
    layers = model.config.get_text_config().num_hidden_layers
    paths = [(path * layers)[:layers] for path in PATHS]
    rows = prompts([5, 11, 2, 9, 14])
    try:
        model.enable_dynamic_routing(paths)
        model.disable_dynamic_routing()
    except NotImplementedError:
        return "refused"
    try:
        expected = [greedy(edited(model, path), row, 2)[1] for path, row in zip(paths, rows, strict=True)]
    except Exception:
        return "not judged"
    model.enable_dynamic_routing(paths)
    try:
        out = model.generate(
            **padded(rows), max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True,
            output_logits=True, pad_token_id=0,
        )  # fmt: skip
    except NotImplementedError:
        return "refused"
    error = (torch.stack(out.logits, 1).float() - torch.stack(expected)).abs().max().item()
    return "exact" if error < 2e-3 else f"wrong by {error:.3f}"
