"""Beside what people combine a model with: PEFT, accelerate, torchao, copies, threads, saving, switching off."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from families import LAYERS, prompts, tiny
from oracles import edited, greedy, padded
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM

import drllm_fast

PATH = [1, 2, 0, 1]
TOLERANCE = {"atol": 2e-3, "rtol": 0}


def logits(model, row):
    with torch.no_grad():
        return model(row[None]).logits[0]


def lora(model):
    torch.manual_seed(2)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return wrapped.eval()


@pytest.mark.parametrize("first", ["lora", "routing"])
def test_lora_before_and_after_enabling(model, row, first):
    reference = edited(lora(copy.deepcopy(model)).get_base_model(), PATH)
    tokens, scores = greedy(reference, row, 5)
    if first == "lora":
        wrapped = lora(model)
        assert drllm_fast.enable_dynamic_routing(wrapped, PATH) is wrapped
    else:
        wrapped = lora(model.enable_dynamic_routing(PATH))
    out = wrapped.generate(row[None], do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    assert out[0, len(row) :].tolist() == tokens.tolist()
    assert wrapped.routing.plan.tolist() == [PATH]
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged, row), logits(reference, row), **TOLERANCE)
    merged.disable_dynamic_routing()
    assert type(merged.model.layers[0]).__mro__[1].__name__ != "LlamaDecoderLayer"


def test_int8_weight_only(model, row):
    quantize_(model, Int8WeightOnlyConfig())
    tokens, scores = greedy(edited(model, PATH), row, 5)
    model.enable_dynamic_routing(PATH)
    ours, our_scores = greedy(model, row, 5)
    assert ours.tolist() == tokens.tolist()
    torch.testing.assert_close(our_scores, scores, **TOLERANCE)


class Counter(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("first", ["hooks", "routing"])
def test_accelerate_hooks(model, row, first):
    """Hooks run around routed layers whichever came first; each goes without taking the other along."""
    expected, dense = logits(edited(model, PATH), row), logits(model, row)
    modules, counter = [model, model.model, *model.model.layers], Counter()

    def attach():
        for module in modules:
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        add_hook_to_module(model.model.layers[1], counter, append=True)

    if first == "hooks":
        attach()
        model.enable_dynamic_routing(PATH)
    else:
        model.enable_dynamic_routing(PATH)
        attach()
    torch.testing.assert_close(logits(model, row), expected, **TOLERANCE)
    assert counter.calls == 1
    model.disable_dynamic_routing()
    assert torch.equal(logits(model, row), dense) and counter.calls == 2
    model.enable_dynamic_routing(PATH)
    for module in modules:
        remove_hook_from_module(module)
    torch.testing.assert_close(logits(model, row), expected, **TOLERANCE)
    assert counter.calls == 2
    model.disable_dynamic_routing()
    assert torch.equal(logits(model, row), dense)


def test_weights_offloaded_by_accelerate(model, row):
    tokens, _ = greedy(edited(model, PATH), row, 4)
    cpu_offload(model, execution_device=torch.device("cpu"))
    model.enable_dynamic_routing(PATH)
    assert greedy(model, row, 4)[0].tolist() == tokens.tolist()


def test_deepcopy_is_a_routed_model_of_its_own(model, row):
    expected, dense = logits(edited(model, PATH), row), logits(model, row)
    model.enable_dynamic_routing(PATH)
    twin = copy.deepcopy(model)
    assert twin.routing is not model.routing
    assert all(layer._drllm_routing is twin.routing for layer in twin.model.layers)
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.zero_()
    torch.testing.assert_close(logits(model, row), expected, **TOLERANCE)
    assert (logits(twin, row) - expected).abs().max() > 0.05
    model.disable_dynamic_routing()
    assert torch.equal(logits(model, row), dense)
    assert twin.routing.plan.tolist() == [PATH]


def test_pickle_and_torch_save(model, row, tmp_path):
    model.enable_dynamic_routing(PATH)
    expected = logits(model, row)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), row), expected)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again, row), expected)
    again.disable_dynamic_routing()
    # In a fresh process, which has registered nothing.
    torch.save((row, expected), tmp_path / "expected.pt")
    code = (
        "import torch; row, expected = torch.load('expected.pt'); m = torch.load('model.pt', weights_only=False); "
        "assert torch.allclose(m(row[None]).logits[0], expected, atol=1e-5); m.disable_dynamic_routing()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(drllm_fast.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_pickled_and_copied_caches(model, row):
    model.enable_dynamic_routing(PATH)
    with torch.no_grad():
        cache = model(row[None]).past_key_values
        twins = [pickle.loads(pickle.dumps(cache)), copy.copy(cache), copy.deepcopy(cache)]
        expected = model(row[None, :1], past_key_values=cache).logits
        for twin in twins:
            assert torch.equal(model(row[None, :1], past_key_values=twin).logits, expected)


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_models_with_another_head(kind, row):
    config = tiny("llama").config
    config.num_labels = 3
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config, dtype=torch.float32).eval()
    batch = padded([row, row[:4]])
    with torch.no_grad():
        expected = edited(model, PATH)(**batch).logits
        model.enable_dynamic_routing(PATH)
        actual = model(**batch).logits
        if kind == "TokenClassification":
            expected, actual = (x[batch["attention_mask"].bool()] for x in (expected, actual))
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    model.disable_dynamic_routing()


def test_tuples_instead_of_outputs(model, row):
    batch = padded([row, row[:4]])
    model.enable_dynamic_routing(PATH)
    with torch.no_grad():
        expected = model.model(**batch).last_hidden_state
        assert torch.equal(model.model(**batch, return_dict=False)[0], expected)
        model.config.return_dict = False
        assert torch.equal(model.model(**batch)[0], expected)


def test_a_compiled_model(model, row):
    expected = logits(edited(model, PATH), row)
    compiled = torch.compile(model, backend="eager")
    drllm_fast.enable_dynamic_routing(compiled, PATH)
    torch.testing.assert_close(logits(compiled, row), expected, **TOLERANCE)
    drllm_fast.disable_dynamic_routing(compiled)


def test_save_and_reload_while_enabled(model, row, tmp_path):
    dense = logits(model, row)
    model.save_pretrained(tmp_path / "before")
    model.enable_dynamic_routing(PATH)
    expected = logits(model, row)
    model.save_pretrained(tmp_path / "while")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "while" / name).read_text() == (tmp_path / "before" / name).read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "while").eval()
    assert type(again).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(again, row), dense)
    again.enable_dynamic_routing(PATH)
    assert torch.equal(logits(again, row), expected)


def test_state_dict_keys_and_parameters_stay(model):
    before = {k: v.data_ptr() for k, v in model.state_dict().items()}
    model.enable_dynamic_routing(PATH)
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == before
    twin = tiny("llama", seed=8)
    model.load_state_dict(twin.state_dict())


def test_disable_leaves_no_trace(model, row):
    def fingerprint(m):
        return [(n, type(x), sorted(x.__dict__)) for n, x in m.named_modules()], m.config.to_dict()

    dense_tokens, dense_scores = greedy(model, row, 5)
    before, attention = fingerprint(model), model.config._attn_implementation
    model.enable_dynamic_routing(PATH)
    greedy(model, row, 5)
    model.disable_dynamic_routing()
    assert fingerprint(model) == before and model.config._attn_implementation == attention
    tokens, scores = greedy(model, row, 5)
    assert torch.equal(tokens, dense_tokens) and torch.equal(scores, dense_scores)
    assert not hasattr(model, "routing")


def test_disabled_is_the_dense_model(model, row):
    dense_tokens, dense_scores = greedy(model, row, 5)
    model.enable_dynamic_routing(PATH)
    with model.routing.disabled():
        tokens, scores = greedy(model, row, 5)
        beams = model.generate(row[None], num_beams=3, max_new_tokens=3, pad_token_id=0)
    assert torch.equal(tokens, dense_tokens) and torch.equal(scores, dense_scores)
    assert beams.shape[1] == len(row) + 3
    assert not torch.equal(greedy(model, row, 5)[1], dense_scores)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_disabled_keeps_the_attention_that_was_chosen(row, implementation):
    model = tiny("llama", attn_implementation=implementation)
    batch = padded([row, row[:4]])
    with torch.no_grad():
        dense = model(**batch).logits
        model.enable_dynamic_routing(PATH)
        with model.routing.disabled():
            assert torch.equal(model(**batch).logits, dense)


def test_a_model_that_shares_the_config_stays_dense(row):
    """The attention's name is on the config, which two models may share: the other one must not notice."""
    model = tiny("llama")
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    batch = padded([row, row[:4]])
    with torch.no_grad():
        dense = other(**batch).logits
        model.enable_dynamic_routing(PATH)
        assert torch.equal(other(**batch).logits, dense)


def test_two_models_at_once(row):
    a, b = tiny("llama"), tiny("qwen3", seed=4)
    paths = [PATH, [0, 1, 2, 1]]
    expected = [greedy(edited(m, p), row, 4)[0].tolist() for m, p in zip((a, b), paths, strict=True)]
    a.enable_dynamic_routing(paths[0])
    b.enable_dynamic_routing(paths[1])
    with a.routing.using([1] * LAYERS), b.routing.disabled():
        dense_a, dense_b = greedy(a, row, 4)[0], greedy(b, row, 4)[0]
    assert [greedy(m, row, 4)[0].tolist() for m in (a, b)] == expected
    assert dense_a.tolist() != expected[0] and dense_b.tolist() != expected[1]


def test_threads_do_not_mix(model):
    """Two threads, one model: each has its own forced paths and its own batch."""
    rows, paths = prompts([7, 12]), [PATH, [0, 1, 2, 1]]
    expected = [greedy(edited(model, p), r, 8)[0].tolist() for r, p in zip(rows, paths, strict=True)]
    model.enable_dynamic_routing([1] * LAYERS)
    results, start = [[], []], threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(4):
            with model.routing.using(paths[i]):
                results[i].append(greedy(model, rows[i], 8)[0].tolist())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [[expected[0]] * 4, [expected[1]] * 4]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_positional_arguments(family, row):
    """GPT-NeoX takes inputs_embeds before past_key_values, Llama after."""
    model = tiny(family)
    base, embeds = model.get_decoder(), model.get_input_embeddings()(row[None])
    order = list(inspect.signature(base.forward).parameters)
    given = {"inputs_embeds": embeds, "use_cache": False}
    expected = edited(model, PATH).get_decoder()(inputs_embeds=embeds).last_hidden_state
    model.enable_dynamic_routing(PATH)
    args = [given.get(name) for name in order[: order.index("use_cache") + 1]]
    torch.testing.assert_close(base(*args).last_hidden_state, expected, **TOLERANCE)


def test_the_base_model_alone(model, row):
    base = model.model
    with torch.no_grad():
        expected = edited(model, PATH).model(row[None]).last_hidden_state
        base.enable_dynamic_routing(PATH)
        torch.testing.assert_close(base(row[None]).last_hidden_state, expected, **TOLERANCE)
    assert base.routing.plan.tolist() == [PATH]
    base.disable_dynamic_routing()
