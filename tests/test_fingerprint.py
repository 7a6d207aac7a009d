"""A model is recognised in any precision and state, and no other model is."""

import copy
import json

import pytest
import torch
from families import FAMILIES, tiny
from torch import nn

import drllm_fast  # noqa: F401  puts enable_dynamic_routing on models
from drllm_fast.fingerprint import TOLERANCE, check, fingerprint

PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def cast(model, dtype):
    return copy.deepcopy(model).to(dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    stored = json.loads(json.dumps(fingerprint(tiny(family))))
    check(tiny(family), stored)
    with pytest.raises(ValueError, match="is not the model"):
        check(tiny(family, seed=1), stored)


@pytest.mark.parametrize("given", PRECISIONS)
@pytest.mark.parametrize("kept", PRECISIONS)
def test_precisions_of_one_model_match(given, kept):
    model = tiny("llama")
    check(cast(model, given), fingerprint(cast(model, kept)))


def test_the_tolerance_holds_for_any_weights_and_not_much_more():
    # Halfway between 1 and the next bf16 number, 1 + 2^-7, rounding is worst. fp16 holds the number exactly.
    model = tiny("llama")
    worst = copy.deepcopy(model)
    for m in (model, worst):
        nn.init.constant_(m.model.embed_tokens.weight, 1 + 2**-8)
    stored = fingerprint(worst.to(torch.bfloat16))
    assert stored["embedding"][0] != fingerprint(model)["embedding"][0]
    check(model, stored)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1 + 2 * TOLERANCE)
    with pytest.raises(ValueError, match="input embedding"):
        check(model, stored)


def test_int8_linear_layers_match():
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny("qwen3")
    stored = fingerprint(model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    check(model, stored)


@pytest.mark.parametrize("change", [1e-2, 5e-2, 1.0])
@pytest.mark.parametrize("part", ["embedding", "norm"])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_changed_weights_do_not_match(change, part, dtype):
    model = tiny("llama")
    stored = fingerprint(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ("embed" if part == "embedding" else "layernorm") in name:
                p.add_(change * p.norm() / p.numel() ** 0.5 * torch.randn_like(p))
    check(tiny("llama"), stored)
    with pytest.raises(ValueError, match="input embedding" if part == "embedding" else "norm weights"):
        check(cast(model, dtype), stored)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"num_hidden_layers": 3}, "num_layers is 3, not 4"),
        ({"hidden_size": 64}, "hidden_size is 64, not 32"),
        ({"vocab_size": 98}, "vocab_size is 98, not 97"),
        ({"num_attention_heads": 8, "head_dim": 8}, "num_attention_heads is 8, not 4"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, not 2"),
    ],
)
def test_structures_differ(change, name):
    with pytest.raises(ValueError, match=name):
        check(tiny("llama", **change), fingerprint(tiny("llama")))


def test_a_family_is_not_another():
    with pytest.raises(ValueError, match="model_type is mistral, not llama"):
        check(tiny("mistral"), fingerprint(tiny("llama")))


def test_routed_wrapped_and_inner_models_match():
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    stored = fingerprint(model)
    check(model.model, stored)
    model.enable_dynamic_routing([1, 0, 2, 1])
    check(model, stored)
    model.disable_dynamic_routing()
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], use_dora=False)
    wrapped = peft.get_peft_model(model, config)
    assert fingerprint(wrapped) == stored
    check(wrapped, stored)


def test_adapters_do_not_count_as_norms():
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    stored = fingerprint(model)
    config = peft.LoraConfig(target_modules=["q_proj"], use_dora=True, modules_to_save=["input_layernorm"])
    assert fingerprint(peft.get_peft_model(model, config)) == stored


def test_norms_without_weights():
    model = tiny("olmo2")
    for layer in model.model.layers:
        layer.post_attention_layernorm = nn.LayerNorm(32, elementwise_affine=False)
        layer.post_feedforward_layernorm = nn.LayerNorm(32, elementwise_affine=False)
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
    stored = fingerprint(model)
    assert stored["norms"] == [[]] * 4
    check(model, stored)


def test_zero_and_nan_weights():
    model = tiny("llama")
    nn.init.zeros_(model.model.embed_tokens.weight)
    stored = fingerprint(model)
    check(model, stored)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="input embedding"):
        check(model, stored)


def test_refusals():
    with pytest.raises(TypeError, match="PreTrainedModel.*given Linear"):
        fingerprint(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="meta device"):
        fingerprint(tiny("llama").to("meta"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda fp: None,
        lambda fp: {},
        lambda fp: fp | {"structure": 3},
        lambda fp: fp | {"norms": None},
        lambda fp: fp | {"embedding": ["x"]},
    ],
)
def test_damaged_fingerprints(damage):
    model = tiny("llama")
    with pytest.raises(ValueError, match="not a fingerprint"):
        check(model, damage(fingerprint(model)))


def test_shortened_samples_do_not_match():
    model = tiny("llama")
    stored = fingerprint(model)
    for part in ("embedding", "norms"):
        with pytest.raises(ValueError, match="entries, not"):
            check(model, stored | {part: stored[part][:1]})
