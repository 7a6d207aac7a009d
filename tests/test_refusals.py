"""What cannot be routed exactly is refused: the error says what was given, what is allowed, and nothing has changed."""

import pytest
import torch
from families import COMMON, LAYERS, prompts, tiny
from oracles import greedy, padded
from peft import PrefixTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
)

import drllm_fast
from drllm_fast import GivenPlan, LayerRouters, StaticPolicy

PATH = [1, 2, 0, 1]
ROW = prompts([9])[0]


@pytest.fixture
def routed(model):
    return model.enable_dynamic_routing(PATH)


def state(model):
    classes = [type(m) for m in model.modules()]
    return classes, [sorted(m.__dict__) for m in model.modules()], model.config._attn_implementation


def logits(model, row=ROW):
    with torch.no_grad():
        return model(row[None]).logits


# -- policies
@pytest.mark.parametrize(
    ("policy", "error", "says"),
    [
        ([1, 1, 1], ValueError, "3 entries.*4 layers"),
        ([[1] * 5, [1] * 5], ValueError, "5 entries.*4 layers"),
        ([1, 3, 1, 1], ValueError, "values from 1 to 3.*0 skip"),
        ([1, -1, 1, 1], ValueError, "values from -1 to 1"),
        ([[1, 1, 1, 1], [1, 1]], ValueError, "ragged"),
        ([], ValueError, "shape"),
        ([[]], ValueError, "shape"),
        (torch.zeros(2, 2, 4, dtype=torch.int8), ValueError, "shape"),
        ([1.0, 1.0, 0.0, 1.0], TypeError, "float"),
        ([True, False, True, True], TypeError, "bool"),
        (["a", "b", "c", "d"], TypeError, "plan"),
        (torch.full((4,), torch.nan), TypeError, "float"),
        (None, TypeError, "not a policy: NoneType"),
        (3, TypeError, "not a policy: int"),
        (GivenPlan, TypeError, "not a policy"),
        ("no/such/folder/anywhere", OSError, "no/such/folder"),
    ],
)
def test_what_is_no_policy(model, policy, error, says):
    before, dense = state(model), logits(model)
    with pytest.raises(error, match=f"(?s){says}"):
        model.enable_dynamic_routing(policy)
    assert state(model) == before and torch.equal(logits(model), dense)


def test_a_budget_for_a_policy_without_one(model):
    before = state(model)
    with pytest.raises(ValueError, match="keeps no budget"):
        model.enable_dynamic_routing(PATH, budget=0.8)
    assert state(model) == before
    model.enable_dynamic_routing(PATH)
    assert model.routing.budget is None
    with pytest.raises(ValueError, match="keeps no budget"):
        model.routing.budget = 0.8


def test_enabling_twice_and_disabling_what_is_off(routed):
    expected = logits(routed)
    with pytest.raises(ValueError, match="on already"):
        routed.enable_dynamic_routing([1] * LAYERS)
    with pytest.raises(ValueError, match="on already"):
        routed.model.enable_dynamic_routing([1] * LAYERS)
    assert torch.equal(logits(routed), expected)
    routed.disable_dynamic_routing()
    with pytest.raises(ValueError, match="not on"):
        routed.disable_dynamic_routing()


def test_not_a_transformers_model():
    with pytest.raises(TypeError, match="PreTrainedModel"):
        drllm_fast.enable_dynamic_routing(torch.nn.Linear(2, 2), PATH)


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (lambda b: [1] * b, TypeError, "list"),
        (lambda b: torch.ones(b), TypeError, "float"),
        (lambda b: torch.ones(b, dtype=torch.bool), TypeError, "bool"),
        (lambda b: torch.ones(b + 1, dtype=torch.int8), ValueError, "shape"),
        (lambda b: torch.ones(b, LAYERS - 1, dtype=torch.int8), ValueError, "shape"),
        (lambda b: torch.full((b,), 3), ValueError, "values from 3"),
        (lambda b: torch.full((b,), 257), ValueError, "values from 257"),
    ],
)
def test_a_policy_that_answers_wrongly(model, answer, error, says):
    class Wrong:
        def route(self, layer, prompts):
            good = torch.ones(len(prompts.cu_seqlens) - 1, dtype=torch.int8)
            return good if layer < 2 else answer(len(good))

    model.enable_dynamic_routing(Wrong())
    cache = DynamicCache(config=model.config)
    with pytest.raises(error, match=says):
        model(ROW[None], past_key_values=cache)
    # The cache is what it was, and good for another try.
    assert type(cache) is DynamicCache and cache.get_seq_length() == 0
    with model.routing.using([1] * LAYERS):
        assert model(ROW[None], past_key_values=cache).past_key_values.get_seq_length() == len(ROW)


# -- routers
def test_a_checkpoint_of_another_model(model, tmp_path):
    LayerRouters.for_model(tiny("llama", seed=9)).save_pretrained(tmp_path / "other")
    LayerRouters.for_model(tiny("llama", num_hidden_layers=5)).save_pretrained(tmp_path / "deeper")
    before, dense = state(model), logits(model)
    for name, says in (("other", "fingerprint|differ"), ("deeper", "5 layers.*has 4")):
        with pytest.raises(ValueError, match=f"(?s){says}"):
            model.enable_dynamic_routing(str(tmp_path / name))
    assert state(model) == before and torch.equal(logits(model), dense)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing", "pickle"])
def test_a_damaged_checkpoint(model, tmp_path, damage):
    LayerRouters.for_model(model).save_pretrained(tmp_path)
    weights = tmp_path / "routers.safetensors"
    data = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "garbage":
        weights.write_bytes(b"\xff" * 100)
    else:
        weights.unlink()
    if damage == "pickle":
        torch.save({}, tmp_path / "pytorch_model.bin")
    before = state(model)
    with pytest.raises(OSError, match="routers.safetensors"):
        model.enable_dynamic_routing(tmp_path)
    assert state(model) == before
    weights.write_bytes(data)
    model.enable_dynamic_routing(tmp_path)
    assert logits(model).isfinite().all()


def test_nan_hidden_states_reach_a_router(model):
    model.enable_dynamic_routing(LayerRouters.for_model(model, generator=torch.Generator().manual_seed(0)))
    embeds = model.get_input_embeddings()(padded(prompts([4, 6]))["input_ids"])
    embeds[1, 3] = torch.nan
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match=r"layer 0: the hidden states of rows \[1\] are not finite"):
        model(inputs_embeds=embeds, past_key_values=cache)
    assert type(cache) is DynamicCache and cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="no table of budgets"):
        model.routing.budget = 0.5


def test_a_static_policy_of_another_depth_or_an_impossible_budget(model):
    before = state(model)
    for policy, budget, says in (
        (StaticPolicy(order=(1, 2), num_layers=5, criterion="cka", budget=1.0), None, "5 blocks, the model has 4"),
        (StaticPolicy(order=(1, 2), num_layers=4, criterion="cka", budget=1.0), 0.25, "budget"),
        (StaticPolicy(order=(1, 2), num_layers=4, criterion="cka", budget=1.0), float("nan"), "budget"),
    ):
        with pytest.raises(ValueError, match=says):
            model.enable_dynamic_routing(policy, budget=budget)
    assert state(model) == before
    model.enable_dynamic_routing(StaticPolicy(order=(1, 2), num_layers=4, criterion="cka", budget=1.0), budget=0.75)
    logits(model)
    assert model.routing.plan.tolist() == [[1, 0, 1, 1]]
    model.routing.budget = 0.5
    logits(model)
    assert model.routing.plan.tolist() == [[1, 0, 0, 1]]


# -- plans and batches
def test_a_batch_that_the_plan_does_not_fit(model):
    model.enable_dynamic_routing([PATH, [1] * LAYERS])
    with pytest.raises(ValueError, match="2 paths and the batch 3 rows"):
        model(**padded(prompts([3, 4, 5])))
    assert model(**padded(prompts([3, 4, 5, 6]))).logits.shape[0] == 4  # two rows for each path


def test_using_and_context_check_what_they_are_given(routed):
    for bad, says in (([1, 1], "2 entries"), ([1, 1, 1, 7], "values")):
        with pytest.raises(ValueError, match=says), routed.routing.using(bad):
            pass
    with pytest.raises(TypeError, match="one positive integer for each"), routed.routing.context(3):
        pass
    for bad in ([], [0], [-1]):
        with pytest.raises(ValueError, match="positive"), routed.routing.context(bad):
            pass
    with pytest.raises(ValueError, match="exceeds its 9 tokens"), routed.routing.context([10]):
        routed(ROW[None])
    with pytest.raises(ValueError, match="2 context lengths"), routed.routing.context([1, 1]):
        routed(ROW[None])


def test_another_plan_on_a_filled_cache(routed):
    cache = routed(ROW[None]).past_key_values
    with routed.routing.using(PATH):  # the same paths are no conflict
        routed(ROW[None, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="another plan"), routed.routing.using([1] * LAYERS):
        routed(ROW[None, :1], past_key_values=cache)
    assert cache.get_seq_length() == len(ROW) + 1


def test_rows_and_masks_that_do_not_fit_the_cache(routed):
    batch = padded(prompts([3, 6]))
    with torch.no_grad():
        cache = routed(**batch).past_key_values
        one = torch.tensor([[5], [6]])
        full = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        hidden = full.clone()
        hidden[1, 0] = 0
        for ids, mask, says in (
            (one[:1], full[:1], "2 rows"),
            (one, None, "attention_mask of all columns"),
            (one, full[:, 1:], "attention_mask has shape"),
            (one, hidden, "past columns"),
        ):
            with pytest.raises(ValueError, match=says):
                routed(ids, attention_mask=mask, past_key_values=cache)
        assert routed(one, attention_mask=full, past_key_values=cache).logits.shape == (2, 1, 97)


def test_a_row_without_tokens(routed):
    batch = padded(prompts([3, 6]))
    batch["attention_mask"][0] = 0
    with pytest.raises(ValueError, match="row 0 has no tokens"):
        routed(**batch)


# -- caches
def test_caches_that_are_not_supported(routed):
    filled = DynamicCache(config=routed.config)
    with routed.routing.disabled(), torch.no_grad():
        routed(ROW[None], past_key_values=filled)
    caches = {
        NotImplementedError: [StaticCache(config=routed.config, max_cache_len=32), DynamicCache(offloading=True)],
        ValueError: [filled],
        TypeError: [((torch.zeros(1), torch.zeros(1)),) * LAYERS],
    }
    for error, given in caches.items():
        for cache in given:
            kind = type(cache)
            with pytest.raises(error):
                routed(ROW[None], past_key_values=cache)
            assert type(cache) is kind
    assert filled.get_seq_length() == len(ROW)
    assert isinstance(QuantizedCache, type)


@pytest.mark.parametrize("implementation", ["static", "offloaded", "offloaded_static"])
def test_cache_implementations_of_generate(routed, implementation):
    with pytest.raises(NotImplementedError, match="DynamicCache|offloaded"):
        routed.generate(ROW[None], max_new_tokens=2, cache_implementation=implementation)


def test_a_routed_cache_in_the_dense_model_and_the_other_way(routed):
    cache = routed(ROW[None]).past_key_values
    with pytest.raises(ValueError, match="switched off"), routed.routing.disabled():
        routed(ROW[None, :1], past_key_values=cache)
    other = tiny("llama")
    with pytest.raises(ValueError, match="filled by a routed model"):
        other(ROW[None, :1], past_key_values=cache)
    routed.disable_dynamic_routing()
    with pytest.raises(ValueError, match="filled by a routed model"):
        routed(ROW[None, :1], past_key_values=cache)


def test_an_emptied_routed_cache_serves_the_dense_model(routed):
    cache = routed(ROW[None]).past_key_values
    cache.reset()
    with routed.routing.disabled(), torch.no_grad():
        dense = routed(ROW[None], past_key_values=cache)
        assert type(cache) is DynamicCache and cache.get_seq_length() == len(ROW)
        assert torch.equal(dense.logits, routed(ROW[None]).logits)


def test_another_routed_model_refuses_the_cache(routed):
    other = tiny("llama", seed=5).enable_dynamic_routing(PATH)
    cache = routed(ROW[None]).past_key_values
    with pytest.raises(ValueError, match="another model"):
        other(ROW[None, :1], past_key_values=cache)


def test_prefix_tuning(model):
    wrapped = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    drllm_fast.enable_dynamic_routing(wrapped, PATH)
    with pytest.raises((ValueError, NotImplementedError), match="prefix-tuning|supports DynamicCache"):
        wrapped(ROW[None])


# -- modes
def test_modes_that_would_be_silently_wrong(routed):
    ids = ROW[None]
    with pytest.raises(NotImplementedError, match="prefill_chunk_size"):
        routed.generate(ids, max_new_tokens=2, prefill_chunk_size=4)
    with pytest.raises(NotImplementedError, match="prefill_chunk_size"):
        routed.generate(ids, GenerationConfig(max_new_tokens=2, prefill_chunk_size=4))
    with pytest.raises(NotImplementedError, match="continuous batching"):
        routed.generate(ids, max_new_tokens=2, cache_implementation="paged")
    with pytest.raises(NotImplementedError, match="continuous batching"):
        routed.generate_batch([ROW.tolist()])
    with pytest.raises(NotImplementedError, match="continuous batching"):
        routed.init_continuous_batching()
    with pytest.raises(NotImplementedError, match="4D"):
        routed(ids, attention_mask=torch.ones(1, 1, 9, 9))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        routed(ids, output_attentions=True)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(NotImplementedError, match="packed"):
        routed(ids, position_ids=positions)
    with pytest.raises(NotImplementedError, match="packed"):
        routed(ids, cu_seq_lens_q=torch.tensor([0, 4, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match="exactly one"):
        routed()
    with pytest.raises(ValueError, match="empty batch"):
        routed(torch.empty(0, 4, dtype=torch.long))
    routed.train()
    routed.gradient_checkpointing_enable()
    with pytest.raises(NotImplementedError, match="gradient checkpointing"):
        routed(ids)


def test_attention_that_makes_its_own_mask():
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def with_bias(hidden_states, attention_mask=None, **kwargs):
        length = hidden_states.shape[1]
        return forward(hidden_states, attention_mask=torch.zeros(1, 1, length, length), **kwargs)

    attention.forward = with_bias
    model.enable_dynamic_routing(PATH)
    with pytest.raises(NotImplementedError, match="mask of its own"):
        model(ROW[None])


def test_attention_that_is_not_causal(routed):
    with pytest.raises(NotImplementedError, match="is_causal"):
        routed(ROW[None], is_causal=False)


def test_position_ids_that_do_not_fit(routed):
    batch = padded(prompts([5, 9]))
    for shape in ((2, 4), (3, 9)):
        with pytest.raises(ValueError, match="position_ids have shape"):
            routed(**batch, position_ids=torch.zeros(shape, dtype=torch.long))


def test_a_config_that_another_routed_model_uses(routed):
    twin = type(routed).__mro__[1](routed.config).eval()
    before = state(twin)
    with pytest.raises(ValueError, match="shares this model's config"):
        twin.enable_dynamic_routing(PATH)
    assert state(twin) == before


def test_a_class_that_was_changed_meanwhile(routed):
    ours = type(routed.model)
    routed.model.__class__ = type("FSDPLlamaModel", (ours,), {})
    expected = logits(routed)
    with pytest.raises(RuntimeError, match="undo that first"):
        routed.disable_dynamic_routing()
    assert torch.equal(logits(routed), expected)
    routed.model.__class__ = ours
    routed.disable_dynamic_routing()


def test_disabling_through_the_base_model_undoes_all_of_it(routed):
    routed.model.disable_dynamic_routing()
    assert not hasattr(routed, "routing") and len(greedy(routed, ROW, 2)[0]) == 2
    routed.enable_dynamic_routing(PATH)


def test_packed_input_with_a_cache(routed):
    cache = routed(ROW[None, :4]).past_key_values
    with pytest.raises(NotImplementedError, match="packed"):
        routed(ROW[None], past_key_values=cache, position_ids=torch.tensor([[4, 5, 6, 0, 1, 2, 3, 4, 5]]))
    assert cache.get_seq_length() == 4


def test_the_attention_was_changed_meanwhile(routed):
    routed.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="attention implementation was changed"):
        routed(ROW[None])
    routed.disable_dynamic_routing()
    assert routed.config._attn_implementation == "eager"
    logits(routed)


def test_router_logits_of_a_mixture_of_experts():
    model = tiny("mixtral").enable_dynamic_routing(PATH)
    with pytest.raises(NotImplementedError, match="output_router_logits"):
        model(ROW[None], output_router_logits=True)


# -- models
SMALL = {k: v for k, v in COMMON.items() if k not in ("pad_token_id", "bos_token_id", "eos_token_id")}
OUTSIDE = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "falcon": SMALL,
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 4},
    "jamba": {**SMALL, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "bamba": {**SMALL, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "falcon_h1": {**SMALL, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4},
    "lfm2": {**SMALL, "layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {
        **SMALL, "head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "gemma3n_text": {
        **SMALL, "head_dim": 8, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4,
    },
    "llama4_text": {**SMALL, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
    "xglm": {"vocab_size": 97, "d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48},
    "t5": {"vocab_size": 97, "d_model": 32, "num_layers": 2, "d_kv": 8, "d_ff": 48, "num_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", OUTSIDE)
def test_models_outside_the_contract(family):
    config = AutoConfig.for_model(family, **OUTSIDE[family])
    if family == "t5":
        from transformers import T5ForConditionalGeneration

        model = T5ForConditionalGeneration(config).eval()
    else:
        model = AutoModelForCausalLM.from_config(config).eval()
    before = state(model)
    with pytest.raises(NotImplementedError, match=f"{type(model).__name__} cannot be routed: .*Supported are"):
        model.enable_dynamic_routing([1] * 4)
    assert state(model) == before


def test_a_model_that_does_not_attend_through_the_interface(model):
    """Found at the first visit, before its result is used."""
    attention = model.model.layers[2].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    model.enable_dynamic_routing([1] * LAYERS)
    with pytest.raises(NotImplementedError, match="AttentionInterface"):
        model(ROW[None])


def test_layers_that_return_tuples(model):
    layer = model.model.layers[1]
    forward = type(layer).forward
    kind = type("LlamaDecoderLayer", (type(layer),), {})
    kind.forward = lambda self, *args, **kwargs: (forward(self, *args, **kwargs),)
    layer.__class__ = kind
    model.enable_dynamic_routing([1] * LAYERS)
    with pytest.raises(NotImplementedError, match="return tuple"):
        model(ROW[None])


def test_greedy_still_works_after_all_of_it(routed):
    assert len(greedy(routed, ROW, 3)[0]) == 3
