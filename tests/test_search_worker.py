"""Searching items on a tiny model, against what Hugging Face's edited stacks say of every path."""

import random
from dataclasses import replace

import pytest
import torch
from characters import Characters
from families import LAYERS, tiny
from oracles import edited, greedy

from drllm_fast.search import PathEvaluator
from drllm_fast.search.base import EARLY_STOP_SAVING, Outcome
from drllm_fast.search.paths import decode, edits, encode
from drllm_fast.search.rewards import REWARDS, Evaluation
from drllm_fast.search.searcher import make_searcher
from drllm_fast.search.unit import Item, SearchConfig
from drllm_fast.search.worker import ItemSearch, SearchWorker

TOKENIZER = Characters()
CONFIG = SearchConfig(simulations=20, leaves=3, probes=4)


def choice_items(count=8, seed=0):
    rng = random.Random(seed)
    words = ["north", "no", "a tree", "six", "all of it", "why"]
    return [
        Item(
            f"q{i}", "made_up", f"{rng.choice('What Who Why'.split())} is {i}?",
            tuple(f" {word}" for word in rng.sample(words, 4)), rng.randrange(4),
        )
        for i in range(count)
    ]  # fmt: skip


def free_items(model, count=6):
    """Half of them have the dense model's answer for the right one, half another path's."""
    items = []
    for i in range(count):
        path = (1,) * LAYERS if i % 2 else (1, 0, 1, 1)
        prompt = f"{i} and {i + 1} make"
        tokens = greedy(edited(model, path), torch.tensor(TOKENIZER.encode(prompt)), 3)[0].tolist()
        items.append(Item(f"f{i}", "made_up", prompt, None, TOKENIZER.decode(tokens), max_new_tokens=3))
    return items


def search(model, items, config=CONFIG, **options):
    evaluator = PathEvaluator(model, TOKENIZER, **{"store_bytes": options.pop("store_bytes", 1 << 26)})
    worker = SearchWorker(evaluator, config, model_hash="m", seed=1, **options)
    return {result.key.item: result for result in worker.run(items)}


@torch.no_grad()
def taken(model, item, path):
    """The choice of a path, or the text it writes; by Hugging Face's own model."""
    alone = edited(model, path)
    before = TOKENIZER.encode(item.prompt)
    if item.choices is None:
        return TOKENIZER.decode(greedy(alone, torch.tensor(before), item.max_new_tokens)[0].tolist())
    scores = []
    for choice in item.choices:
        ids = torch.tensor([before + TOKENIZER.encode(choice)])
        logp = alone(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1].log_softmax(-1)
        scores.append(float(logp.gather(1, ids[0, len(before) :, None]).sum()))
    return str(max(range(len(scores)), key=scores.__getitem__))


@pytest.mark.parametrize("kind", ["choice", "free"])
def test_results_are_what_the_paths_do(kind):
    model = tiny("llama")
    items = choice_items() if kind == "choice" else free_items(model)
    config = replace(CONFIG, simulations=60)
    results = search(model, items, config)
    assert set(results) == {item.id for item in items}
    for item in items:
        result = results[item.id]
        assert result.paths[0] == "1" * LAYERS and len(set(result.paths)) == len(result.paths) <= config.simulations + 1
        assert len(result.paths) == len(result.rewards) == len(result.correct) == len(result.predictions)
        answers = {text: taken(model, item, decode(text)) for text in {*result.paths, *result.probes}}
        assert result.predictions == [answers[text] for text in result.paths]
        right = str(item.answer)
        assert result.correct == [answers[text].strip() == right.strip() for text in result.paths]
        assert result.rewards == [float(correct) for correct in result.correct]
        assert result.probes_correct == [answers[text].strip() == right.strip() for text in result.probes]
        singles = {encode(path) for path in edits((1,) * LAYERS)}
        assert len(set(result.probes)) == CONFIG.probes and set(result.probes) <= singles
        found = [path for path, correct in zip(result.paths, result.correct, strict=True) if correct]
        shortest = min((sum(decode(path)) for path in found), default=LAYERS)
        assert sum(decode(result.best)) == shortest and result.best in (found or ["1" * LAYERS])
        assert result.kept == (bool(found) and (not result.correct[0] or shortest < LAYERS))
        assert result.visits <= result.visits_alone and result.forwards >= len(result.paths)
    kinds = {(result.correct[0], result.kept) for result in results.values()}
    assert {(True, True), (False, True)} <= kinds  # preserved, repaired


def test_the_control_aims_at_another_wrong_answer():
    model = tiny("llama")
    items = choice_items(16)
    results = search(model, items)
    seen = set()
    for item in items:
        result = results[item.id]
        assert (result.control_target is None) == result.correct[0] == (result.control_reached is None)
        if result.control_target is not None:
            assert result.control_target not in (str(item.answer), result.predictions[0])
            seen.add(result.control_reached)
    assert seen == {True, False}
    alone = search(model, items, replace(CONFIG, control=False))
    for name, result in alone.items():
        assert result.control_target is None and result.paths == results[name].paths
    # The control is the same search: turned around, the wrong answer is the right one and finds it just so.
    for item in items:
        result = results[item.id]
        if result.control_reached is not None:
            turned = search(model, [replace(item, answer=int(result.control_target))])[item.id]
            assert turned.kept == result.control_reached or turned.paths != result.paths


@pytest.mark.parametrize("method", ["mcts", "beam", "policy-gradient", "random", "chain"])
def test_results_do_not_depend_on_the_company(method):
    """Alone or side by side, with states kept or not: the same."""
    model = tiny("qwen3")
    config = replace(CONFIG, method=method)
    items = choice_items() + free_items(model, 2)
    together = search(model, items, config, together=5)
    for item in items:
        alone = search(model, [item], config, store_bytes=0)[item.id]
        for name in ("paths", "predictions", "correct", "best", "kept", "probes", "control_target", "control_reached"):
            assert getattr(alone, name) == getattr(together[item.id], name)
        assert alone.forwards == together[item.id].forwards


@pytest.mark.parametrize("reward", REWARDS)
def test_rewards(reward):
    model = tiny("llama")
    config = replace(CONFIG, reward=reward, agree=2)
    items = choice_items() + (free_items(model, 2) if reward != "margin" else [])
    results = search(model, items, config)
    for item in items:
        result = results[item.id]
        own = [path for path, correct in zip(result.paths, result.correct, strict=True) if correct]
        if reward == "exact":
            assert result.rewards == [float(correct) for correct in result.correct]
        elif reward == "agreement":
            assert result.rewards == [float(correct) for correct in result.correct]
            assert len(own) >= 2 or (result.best == "1" * LAYERS and not result.kept)
        elif reward == "kl":
            assert abs(result.rewards[0]) < 1e-6 and max(result.rewards) < 1e-5 and min(result.rewards) < -1e-3
            dense = result.predictions[0]
            assert result.correct == [prediction == dense for prediction in result.predictions]
        elif item.choices is None:
            scores = PathEvaluator(model, TOKENIZER).score_choices(
                item.prompt, [f" {item.answer}"], [decode(path) for path in result.paths]
            )
            torch.testing.assert_close(torch.tensor(result.rewards), scores[:, 0], atol=1e-3, rtol=0)
        else:
            right = [row[item.answer] for row in result.scores]
            if reward == "margin":
                others = [max(x for c, x in enumerate(row) if c != item.answer) for row in result.scores]
                right = [a - b for a, b in zip(right, others, strict=True)]
                assert result.correct == [margin > 0 for margin in right]
            assert result.rewards == pytest.approx(right)


def test_a_better_path_as_long_as_the_dense_one_is_no_find():
    config = replace(CONFIG, reward="margin", probes=0)
    one = ItemSearch(choice_items(1)[0], SearchWorker(PathEvaluator(tiny("llama"), TOKENIZER), config, model_hash="m"))
    right, scores = one.item.answer, [0.0] * 4
    for path, reward, kept in (((1, 1, 1, 1), 1.0, False), ((0, 2, 1, 1), 2.0, False), ((0, 1, 1, 1), 0.5, True)):
        scores[right] = reward
        one.known[path] = Evaluation(str(right), tuple(scores))
        if not one.aims:
            one.tell()
        one.aims[0].told[path] = Outcome(reward, True)
        assert one.result().best == encode(path) and one.result().kept == kept


def test_agreement_decides_when_a_search_ends():
    """At the path with which enough agree, the dense one among them, if that repairs or saves enough."""
    model, ended = tiny("llama"), set()
    items = choice_items(12)
    config = replace(CONFIG, reward="agreement", agree=2, control=False, leaves=1)
    for item in search(model, items, config).values():
        right, end = 0, None
        for at, (path, correct) in enumerate(zip(item.paths, item.correct, strict=True)):
            right += correct
            enough = not item.correct[0] or LAYERS - sum(decode(path)) >= EARLY_STOP_SAVING
            if at and correct and right >= 2 and enough and end is None:
                end = at
        assert len(item.paths) == (CONFIG.simulations if end is None else end) + 1
        ended.add((item.correct[0], end is not None))
    assert {(True, True), (False, True)} <= ended


def test_the_control_of_a_free_answer_is_rewarded_for_its_own(monkeypatch):
    model, firsts = tiny("llama"), []

    def noted(config, layers, first, *rest):
        firsts.append(first)
        return make_searcher(config, layers, first, *rest)

    monkeypatch.setattr("drllm_fast.search.worker.make_searcher", noted)
    item = Item("f", "made_up", "6 and 7 make", None, "13", max_new_tokens=3)
    result = search(model, [item], replace(CONFIG, reward="loglik"))["f"]
    texts = [" 13", f" {result.control_target}"]
    scores = PathEvaluator(model, TOKENIZER).score_choices(item.prompt, texts, list(map(decode, result.paths)))
    assert [first.reward for first in firsts] == pytest.approx(scores[0].tolist(), abs=1e-3)
    assert abs(scores[0, 0] - scores[0, 1]) > 0.1
    assert sum(result.scores, []) == pytest.approx(scores[:, 0].tolist(), abs=1e-3) == result.rewards


@pytest.mark.parametrize("reward", ["loglik", "kl"])
def test_nothing_is_remembered_of_a_searched_item(reward):
    model = tiny("llama")
    evaluator = PathEvaluator(model, TOKENIZER)
    worker = SearchWorker(evaluator, replace(CONFIG, reward=reward), model_hash="m")
    number = Item("n", "made_up", "6 and 7 make", None, "13", max_new_tokens=3)  # which has a control
    assert len(list(worker.run([*choice_items(3), *free_items(model, 2), number]))) == 6
    assert not evaluator._prompts and len(evaluator.store) == evaluator.store.bytes == 0


def test_refusals():
    model = tiny("llama")
    with pytest.raises(ValueError, match="has only one"):
        search(model, [replace(choice_items(1)[0], choices=(" no",), answer=0)], replace(CONFIG, reward="margin"))
    with pytest.raises(ValueError, match="compares choices"):
        search(model, free_items(model, 1), replace(CONFIG, reward="margin"))
    with pytest.raises(ValueError, match="reward must be one of"):
        search(model, choice_items(1), replace(CONFIG, reward="luck"))
    with pytest.raises(ValueError, match="agree"):
        search(model, choice_items(1), replace(CONFIG, agree=0))
    with pytest.raises(ValueError, match="method must be"):
        search(model, choice_items(1), replace(CONFIG, method="luck"))
