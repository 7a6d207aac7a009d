"""Examples out of stores that are written here, against what was written."""

import math
from dataclasses import replace

import pytest
import torch
from characters import Characters
from families import LAYERS, tiny

from drllm_fast.fingerprint import fingerprint
from drllm_fast.search.batches import EncodedPrompt
from drllm_fast.search.manifest import Manifest
from drllm_fast.search.store import open_store
from drllm_fast.search.tokens import encode_context, encode_pair, encode_prompt
from drllm_fast.search.unit import Item, SearchConfig, UnitKey, UnitResult, prompt_hash
from drllm_fast.search.worker import SearchWorker
from drllm_fast.training.examples import Example, load_examples, soft_targets, targets_of, training_set_hash

TOKENIZER, CONFIG = Characters(), SearchConfig()
DENSE = "1" * LAYERS


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def result(item, manifest, best=DENSE, paths=(DENSE,), correct=(False,), **changes):
    values = {
        "key": UnitKey(item.task, item.id, prompt_hash(item), manifest.model_hash, manifest.config_hash, 0),
        "prompt": item.prompt, "choices": None if item.choices is None else list(item.choices),
        "answer": str(item.answer), "level": item.level, "paths": list(paths), "rewards": [0.0] * len(paths),
        "correct": list(correct), "predictions": ["0"] * len(paths), "scores": None, "best": best,
        "kept": best != DENSE, "control_target": None, "control_reached": None, "probes": ["0111"],
        "probes_correct": [True], "forwards": 1, "visits": 4, "visits_alone": 4, "grader": "choice", "seconds": 0.1,
    }  # fmt: skip
    return UnitResult(**(values | changes))


def items(count, task="quiz"):
    return [Item(f"q{i}", task, f"What is {task} {i}? ", (" a", " b"), 0, level=1 + i % 2) for i in range(count)]


def store(folder, model, *results_of):
    """results_of: functions of the manifest."""
    manifest = Manifest.of(model="tiny", fingerprint=fingerprint(model), config=CONFIG, task=str(folder), seed=0)
    with open_store(folder, manifest, "sqlite") as opened:
        opened.put([make(manifest) for make in results_of])
    return folder


def kept(item, best, **more):
    found = (DENSE, best)
    return lambda manifest: result(item, manifest, best, **({"paths": found, "correct": (True, True)} | more))


def left(item):
    return lambda manifest: result(item, manifest)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    a, b, c, d = items(4)
    three = {"paths": (DENSE, "1011", "0110", "2101", "1211"), "correct": (True, True, True, False, True)}
    made = (kept(a, "1011"), left(b), kept(c, "0110", **three), kept(d, "0211", grader="exact"))
    return store(tmp_path_factory.mktemp("stores") / "quiz", model, *made)


def load(stores, model, **options):
    return load_examples(stores, tokenizer=TOKENIZER, model=model, **options)


# -- what is loaded
def test_best_paths(folder, model):
    a, b, c, d = items(4)
    tokens = {item.id: tuple(TOKENIZER.encode(item.prompt.rstrip())) for item in (a, b, c, d)}
    expected = [
        Example("q0", "quiz", 1, tokens["q0"], (1, 0, 1, 1), None, "choice"),
        Example("q2", "quiz", 1, tokens["q2"], (0, 1, 1, 0), None, "choice"),
        Example("q3", "quiz", 2, tokens["q3"], (0, 2, 1, 1), None, "exact"),
    ]
    assert load([folder], model) == expected
    assert load_examples([str(folder)], tokenizer=TOKENIZER, num_layers=LAYERS) == expected
    every = load([folder], model, only_kept=False)
    assert every == [expected[0], Example("q1", "quiz", 2, tokens["q1"], (1, 1, 1, 1), None, "choice"), *expected[1:]]
    assert load([folder], model, levels=[2]) == load([folder], model, levels="2") == expected[2:]
    assert load([folder], model, limit=2) == expected[:2]
    assert [example.group for example in expected] == ["quiz/1", "quiz/1", "quiz/2"]
    assert replace(expected[0], level=None).group == "quiz"


def test_soft_targets_are_shares_of_correct_paths(folder, model):
    first, third, _ = load([folder], model, targets="soft", temperature=2.0)
    assert first.path == (1, 0, 1, 1) and third.path == (0, 1, 1, 0)
    weights = [math.exp(-visits / 2.0) for visits in (4, 3, 2, 5)]  # the wrong path counts for nothing
    whole = sum(weights)
    dense, skip_one, skip_two, repeat = (weight / whole for weight in weights)
    expected = [
        (skip_two, dense + skip_one + repeat, 0.0),
        (skip_one, dense + skip_two, repeat),
        (0.0, 1.0, 0.0),
        (skip_two, dense + skip_one + repeat, 0.0),
    ]
    torch.testing.assert_close(torch.tensor(third.targets), torch.tensor(expected))
    cold = load([folder], model, targets="soft", temperature=0.01)[1]
    torch.testing.assert_close(torch.tensor(cold.targets).argmax(1), torch.tensor(third.path))
    assert torch.tensor(cold.targets).amax(1).min() > 0.999
    with_all = load([folder], model, targets="soft", only_kept=False)
    assert with_all[1].path == (1, 1, 1, 1) and with_all[1].targets is None


def test_soft_targets_of_long_paths():
    """No weight underflows."""
    [(skip, execute, repeat)] = soft_targets([(2,)], 1e-4)
    assert (skip, execute, repeat) == (0, 0, 1)
    found = torch.tensor(soft_targets([(2,) * 500, (2,) * 499 + (1,)], 0.1))
    torch.testing.assert_close(found[-1, 1], torch.tensor(1 / (1 + math.exp(-10))))


def test_targets_as_tensors(folder, model):
    best = targets_of(load([folder], model))
    assert best.dtype == torch.int8 and best.tolist() == [[1, 0, 1, 1], [0, 1, 1, 0], [0, 2, 1, 1]]
    examples = load([folder], model, targets="soft", only_kept=False)
    soft = targets_of(examples)
    assert soft.dtype == torch.float32 and soft.shape == (4, LAYERS, 3)
    torch.testing.assert_close(soft.sum(2), torch.ones(4, LAYERS))
    assert soft[1].tolist() == [[0.0, 1.0, 0.0]] * LAYERS
    torch.testing.assert_close(soft[2], torch.tensor(examples[2].targets))


def test_several_stores(folder, model, tmp_path):
    other = store(tmp_path / "more", model, *(kept(item, "1110") for item in items(3, "exam")))
    examples = load([other, folder], model, limit=2)
    assert [(e.task, e.id) for e in examples] == [("exam", "q0"), ("exam", "q1"), ("quiz", "q0"), ("quiz", "q2")]


def test_the_hash_is_of_the_examples(folder, model):
    examples = load([folder], model)
    digest = training_set_hash(examples)
    assert len(digest) == 16 and training_set_hash(examples[::-1]) == digest
    changed = [
        examples[:-1],
        [*examples, examples[0]],
        [replace(examples[0], tokens=(5,)), *examples[1:]],
        [replace(examples[0], path=(1, 1, 1, 1)), *examples[1:]],
        [replace(examples[0], level=None), *examples[1:]],
        load([folder], model, targets="soft"),
    ]
    hashes = {digest, *map(training_set_hash, changed)}
    assert len(hashes) == len(changed) + 1


# -- tokens
class Merging(Characters):
    """Two spaces are one token, and a token is put before a text."""

    def encode(self, text, add_special_tokens=True):
        ids = super().encode(text.replace("  ", "\x7f"))
        return [1, *ids] if add_special_tokens else ids


@pytest.mark.parametrize("tokenizer", [Characters(), Merging()])
@pytest.mark.parametrize("text", ["What? ", "What?", "a  b", "  ", "", "\n", "ends \n ", "\x01 begun"])
def test_the_tokens_are_those_of_the_search(tokenizer, text):
    for choice in (" a", "  b c", "z"):
        before, _ = encode_pair(tokenizer, text, choice)
        assert encode_context(tokenizer, text, choices=True) == before
    assert encode_context(tokenizer, text, choices=False) == encode_prompt(tokenizer, text)


def test_the_search_runs_the_same_tokens(model, tmp_path, monkeypatch):
    """From a search: the tokens that it encoded are the tokens to train on."""
    from drllm_fast.search import PathEvaluator, evaluator

    contexts = set()

    class Noted(EncodedPrompt):
        def __init__(self, pairs):
            super().__init__(pairs)
            contexts.add(tuple(pairs[0][0]))

    monkeypatch.setattr(evaluator, "EncodedPrompt", Noted)
    free = Item("free", "quiz", "1 and 1 make ", None, "2", max_new_tokens=2)
    searched = [*items(3), free]
    manifest = Manifest.of(model="tiny", fingerprint=fingerprint(model), config=CONFIG, task="quiz", seed=0)
    worker = SearchWorker(
        PathEvaluator(model, TOKENIZER), replace(CONFIG, simulations=3), model_hash=manifest.model_hash
    )
    with open_store(tmp_path / "out", manifest, "sqlite") as opened:
        found = list(worker.run(searched))
        opened.put([replace(r, key=replace(r.key, config=manifest.config_hash)) for r in found])
    examples = load([tmp_path / "out"], model, only_kept=False)
    assert len(examples) == 4 and {example.tokens for example in examples} == contexts
    assert tuple(TOKENIZER.encode("1 and 1 make ")) in contexts


# -- refusals
def test_refusals(folder, model, tmp_path):
    a, b = items(2)

    def refused(words, stores, of=model, error=ValueError, **options):
        with pytest.raises(error, match=words):
            load(stores, of, **options)

    refused("is no output of a search", [tmp_path], error=FileNotFoundError)
    refused("holds paths of tiny: .*input embedding.*searched", [folder], of=tiny("llama", seed=1))
    refused("holds paths of tiny: .*num_layers", [folder], of=tiny("llama", num_hidden_layers=5))
    refused("q0: a path of 4 blocks, the model has 5", [folder], of=None, num_layers=5)
    refused("prompt of quiz/q0 was searched in .*quiz and in .*quiz", [folder, folder])
    copy = store(tmp_path / "copy", model, kept(items(3)[2], "1110"))
    refused("prompt of quiz/q2 was searched in .*quiz and in .*copy", [folder, copy])
    odd = store(tmp_path / "odd", model, kept(a, "1311"))
    refused("odd, quiz/q0: not a layer path: '1311'", [odd])
    long = store(tmp_path / "long", model, kept(a, "0111", paths=(DENSE, "01111")))
    refused("long, quiz/q0: a path of 5 blocks", [long], targets="soft")
    none = store(tmp_path / "none", model, left(a), left(b))
    refused("of 2 searched prompts 0 were kept.*more simulations", [none])
    refused(r"of 4 searched prompts 3 were kept.*levels \[7\]", [folder], levels="7")
    refused("of 0 searched prompts", [store(tmp_path / "empty", model)])
    for options, words in (
        ({"targets": "worst"}, "targets must be one of best, soft"),
        ({"temperature": 0.0}, "temperature must be a positive"),
        ({"temperature": math.nan}, "temperature must be a positive"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"levels": "easy"}, "levels 'easy'"),
    ):
        refused(words, [folder], **options)
    refused("list of one or more folders", [])
    refused("list of one or more folders", str(folder))
    refused("either the model or num_layers", [folder], of=None, error=TypeError)
    refused("either the model or num_layers", [folder], num_layers=4, error=TypeError)
