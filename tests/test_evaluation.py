"""Evaluations of a tiny model, against Hugging Face's edited stacks run one item at a time."""

import json
import math
from dataclasses import replace

import pytest
import torch
from evaluation_cases import TOKENIZER, Thrifty, choices, free, scores, texts, written
from families import LAYERS, tiny

import drllm_fast
from drllm_fast import LayerRouters
from drllm_fast.budget import BudgetTable
from drllm_fast.evaluation import EvaluationReport, evaluate
from drllm_fast.evaluation.contenders import contenders, context_tokens
from drllm_fast.evaluation.outcomes import group_of
from drllm_fast.influence import StaticPolicy
from drllm_fast.search.evaluator import PathEvaluator
from drllm_fast.search.paths import decode

BUDGETS = (1.0, 0.8, 0.6)
DENSE = (1,) * LAYERS


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def items(model):
    return [*choices(), *texts(), *free(model)]


@pytest.fixture
def policy(model):
    return Thrifty(model)


def run(model, items, policy=None, **options):
    values = {"budgets": BUDGETS, "static": ["block-influence"], "random_masks": 2, "oracle": True, "samples": 200}
    return evaluate(model, TOKENIZER, items, routers=policy, **(values | options))


def compete(model, items, policy, **options):
    values = {"budgets": BUDGETS, "static": ["block-influence", "cka"], "random_masks": 2}
    return contenders(model, TOKENIZER, items, routers=policy, **(values | options))


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def outcomes(folder):
    found = {}
    for line in lines(folder):
        found.setdefault(line["item"], {}).update(line["outcomes"])
    return found


def close(a, b):
    """Figures of two evaluations are the same but for rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, abs=1e-4) if isinstance(a, float) else a == b


# -- what is compared
def test_routers_read_each_context_alone(model, items, policy):
    policy.budget = 0.33
    found = compete(model, items, policy)
    assert policy.budget == 0.33
    routed = {c.budget: c.paths for c in found if c.kind == "routers"}
    for budget in BUDGETS:
        policy.budget = budget
        drllm_fast.enable_dynamic_routing(model, policy)
        try:
            for item, path in zip(items, routed[budget], strict=True):
                with torch.no_grad():
                    model(input_ids=torch.tensor([TOKENIZER.encode(item.prompt)]))
                assert tuple(model.routing.plan[0].tolist()) == path
        finally:
            model.disable_dynamic_routing()
    paths = {path for some in routed.values() for path in some}
    assert len(paths) > 10 and {0, 1, 2} <= {step for path in paths for step in path}
    means = [sum(map(sum, routed[budget])) for budget in BUDGETS]
    assert means[0] > means[1] > means[2]


def test_paths_depend_on_the_context_alone(model, items, policy):
    def other(item):
        if item.choices is None:
            return replace(item, answer="another answer")
        return replace(item, choices=(" completely different", *item.choices[1:]), answer=0)

    known = [c.paths for c in compete(model, items, policy) if c.kind == "routers"]
    for changed, back in ((list(map(other, items)), 1), (items[::-1], -1)):
        found = [c.paths[::back] for c in compete(model, changed, policy) if c.kind == "routers"]
        assert found == known
    small = [c.paths for c in compete(model, items, policy, max_tokens=7) if c.kind == "routers"]
    assert small == known


def test_an_empty_context_is_the_prefix_token():
    [item] = texts(1)
    assert context_tokens(TOKENIZER, replace(item, prompt="")) == (TOKENIZER.bos_token_id,)
    assert context_tokens(TOKENIZER, replace(item, prompt="ab ")) == tuple(TOKENIZER.encode("ab"))


def test_masks_run_as_much_as_the_routers_beside_them(model, items, policy):
    found = compete(model, items, policy)
    orders = {
        name: StaticPolicy.calibrate(model, TOKENIZER, budget=1 / LAYERS, criterion=name, progress=False).order
        for name in ("block-influence", "cka")
    }
    groups = {group_of(item) for item in items}
    seen = set()
    for group in groups:
        own = [i for i, item in enumerate(items) if group_of(item) == group]
        for budget in BUDGETS:
            [routed] = [c for c in found if c.kind == "routers" and c.budget == budget]
            run = sum(sum(routed.paths[i]) for i in own)
            for c in found:
                if c.kind not in ("static", "random") or c.budget != budget:
                    continue
                lengths = [sum(c.paths[i]) for i in own]
                assert sum(lengths) == min(max(run, len(own)), LAYERS * len(own))
                assert max(lengths) - min(lengths) <= 1
                assert len({c.paths[i] for i in own}) == len(set(lengths))  # one mask for each length
                seen |= set(lengths)
                for i in own:
                    left = {block for block, times in enumerate(c.paths[i]) if not times}
                    assert set(c.paths[i]) <= {0, 1}
                    if c.kind == "static":
                        assert left == set(orders[c.name][: len(left)])
    assert len(seen) > 2  # tasks and budgets do differ


def test_random_masks_are_drawn_from_the_seed(model, items):
    def drawn(**options):
        found = compete(model, items, None, static=(), random_masks=6, budgets=(0.5,), **options)
        return [c.paths[0] for c in found if c.kind == "random"]

    assert drawn() == drawn() != drawn(seed=1)
    assert len(set(drawn())) > 2 and {sum(path) for path in drawn()} == {2}


def test_without_routers_budgets_say_how_much_is_left_out(model, items):
    found = compete(model, items, None, budgets=(1.0, 0.75, 0.3))
    sizes = {c.budget: sum(c.paths[0]) for c in found if c.kind == "static" and c.name == "cka"}
    assert sizes == {1.0: 4, 0.75: 3, 0.3: 1}


# -- what is scored
def test_outcomes_are_those_of_edited_stacks(model, items, policy, tmp_path):
    run(model, items, policy, output=tmp_path, together=4)
    found, wanted = outcomes(tmp_path), compete(model, items, policy, static=["block-influence"])
    rights = []
    for number, item in enumerate(items):
        assert {decode(path) for path in found[item.id]} == {c.paths[number] for c in wanted}
        for path, outcome in found[item.id].items():
            if item.choices is None:
                assert outcome["answer"] == written(model, item, decode(path))
                assert outcome["correct"] == (outcome["answer"].strip() == item.answer.strip())
                rights.append(outcome["correct"])
            else:
                assert outcome == pytest.approx(scores(model, item, decode(path)), abs=1e-4)
    assert len(set(rights)) == 2


def test_figures_follow_from_the_scores(model, items, policy, tmp_path):
    report = run(model, items, policy, output=tmp_path)
    found, wanted = outcomes(tmp_path), compete(model, items, policy, static=["block-influence"])
    tasks = {task["task"]: task for task in report.figures["tasks"]}
    assert {name: task["measure"] for name, task in tasks.items()} == {
        "quiz": "accuracy", "text": "perplexity", "sums": "accuracy"
    }  # fmt: skip
    paths = {}  # by contender, for each item as many as there are masks
    for c in wanted:
        paths.setdefault((c.kind, c.name, c.budget), []).append(c.paths)
    for task in tasks.values():
        own = [i for i, item in enumerate(items) if item.task == task["task"]]
        assert task["n"] == len(own)
        for row in task["rows"]:
            if row["kind"] == "oracle":
                continue
            masks = paths[row["kind"], row["name"], row["budget"]]
            values, tokens, runs = [], [], []
            for i in own:
                for mask in masks:
                    outcome, item = found[items[i].id]["".join(map(str, mask[i]))], items[i]
                    runs.append(sum(mask[i]))
                    if task["measure"] == "perplexity":
                        values.append(-outcome[0])
                        tokens.append(len(TOKENIZER.encode(item.choices[0])))
                    elif item.choices is None:
                        values.append(outcome["correct"])
                    else:
                        values.append(max(range(3), key=outcome.__getitem__) == item.answer)
            if task["measure"] == "perplexity":
                assert row["value"] == pytest.approx(math.exp(sum(values) / sum(tokens)))
            else:
                assert row["value"] == pytest.approx(sum(values) / len(values))
            assert row["visits"] == pytest.approx(sum(runs) / len(runs))
            assert row["share"] == pytest.approx(row["visits"] / LAYERS) and row["masks"] == len(masks)
            assert row["low"] <= row["value"] + 1e-9 and row["value"] <= row["high"] + 1e-9
    rivals = [row for row in tasks["quiz"]["rows"] if row["kind"] == "routers"]
    assert all(row["versus_static"]["name"] == "block-influence" for row in rivals)


def test_accuracy_by_characters(model, tmp_path):
    items = choices(20)
    report = run(model, items, output=tmp_path, budgets=(0.5,), random_masks=0)
    dense = report.figures["tasks"][0]["rows"][0]
    hits, plain = [], []
    for item in items:
        told = scores(model, item, DENSE)
        rate = [score / len(choice.strip()) for score, choice in zip(told, item.choices, strict=True)]
        hits.append(rate.index(max(rate)) == item.answer)
        plain.append(told.index(max(told)) == item.answer)
    assert hits != plain
    assert dense["normalised"]["value"] == pytest.approx(sum(hits) / 20)
    assert dense["value"] == pytest.approx(sum(plain) / 20)


def test_company_and_order_change_nothing(model, items, policy, tmp_path):
    known = run(model, items, policy, together=16).figures
    assert close(run(model, items, policy, together=1, max_tokens=40).figures, known)
    run(model, items, policy, output=tmp_path / "a")
    run(model, items[::-1], policy, output=tmp_path / "b", together=3)
    a, b = outcomes(tmp_path / "a"), outcomes(tmp_path / "b")
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        assert all(close(a[name][path], b[name][path]) for path in a[name])


def test_the_model_is_left_as_it_was(model, items, policy):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    run(model, items, policy)
    assert not hasattr(model, "routing") and all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


# -- going on
def test_an_interrupted_evaluation_goes_on(model, items, policy, tmp_path, monkeypatch):
    whole = run(model, items, policy, output=tmp_path / "whole").figures
    calls = []
    score_many = PathEvaluator.score_many

    def interrupted(self, requests):
        calls.append(len(requests))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score_many(self, requests)

    with monkeypatch.context() as patch:
        patch.setattr(PathEvaluator, "score_many", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"6 of 18 items"):
            run(model, items, policy, output=tmp_path / "cut", together=3)
    assert len(lines(tmp_path / "cut")) == 6 and not (tmp_path / "cut" / "report.json").exists()
    with (tmp_path / "cut" / "results.jsonl").open("a") as file:
        file.write('{"task": "quiz", "item": "q7", "pro')  # as a kill leaves it
    assert close(run(model, items, policy, output=tmp_path / "cut").figures, whole)
    found = lines(tmp_path / "cut")
    assert sorted(line["item"] for line in found) == sorted(item.id for item in items)


def test_what_is_scored_is_not_scored_again(model, items, policy, tmp_path, monkeypatch):
    first = run(model, items[:5], policy, output=tmp_path, static=(), oracle=False)
    asked = []
    score_many = PathEvaluator.score_many

    def counted(self, requests):
        asked.extend((prompt, tuple(path)) for prompt, _, paths in requests for path in paths)
        return score_many(self, requests)

    monkeypatch.setattr(PathEvaluator, "score_many", counted)
    again = run(model, items[:5], policy, output=tmp_path, static=(), oracle=False)
    assert not asked and again == first
    run(model, items[:6], policy, output=tmp_path, budgets=(*BUDGETS, 0.4), oracle=False, static=())
    assert len(set(asked)) == len(asked) and DENSE not in {path for prompt, path in asked if prompt != items[5].prompt}
    # An item whose prompt has changed is another one.
    del asked[:]
    run(model, [replace(items[0], prompt="Else?")], policy, output=tmp_path)
    assert {prompt for prompt, _ in asked} == {"Else?"} and ("Else?", DENSE) in asked


def test_another_grader_judges_again(model, tmp_path):
    [item] = [replace(item, answer="zz") for item in free(model, 1)]
    run(model, [item], output=tmp_path, graders="exact")
    run(model, [item], output=tmp_path, graders={"sums": "first-word"})
    assert [line["grader"] for line in lines(tmp_path)] == ["exact 1", "first-word 1"]


def test_a_checkpoint_folder_serves_as_routers(model, items, tmp_path):
    routers = LayerRouters.for_model(model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routers.w2 *= 40
    with pytest.raises(ValueError, match="no table of budgets"):
        run(model, items, routers, output=tmp_path / "out")
    routers.calibration = BudgetTable((0.5, 0.92), (9.0, 0.0))
    with pytest.raises(ValueError, match="budget 0.4"):
        run(model, items, routers, budgets=(0.9, 0.4), output=tmp_path / "out")
    assert routers.budget is None and not (tmp_path / "out").exists()
    routers.save_pretrained(tmp_path / "checkpoint")
    report = run(model, items, tmp_path / "checkpoint", budgets=None)
    found = [row for row in report.figures["tasks"][0]["rows"] if row["kind"] == "routers"]
    assert [row["budget"] for row in found] == [0.9, 0.85, 0.8, 0.75]  # the usual ones that it is calibrated for
    assert found[0]["visits"] > found[-1]["visits"]
    assert run(model, items, routers, budgets=None).figures == report.figures and routers.budget is None
    routers.calibration = BudgetTable((0.5, 0.6), (9.0, 0.0))
    [*_, row] = run(model, items, routers, budgets=None, oracle=False).figures["tasks"][0]["rows"]
    assert row["budget"] == 0.5


# -- refusals
@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"budgets": (1.2,)}, ValueError, "budget"),
        ({"budgets": (0.0,)}, ValueError, "budget"),
        ({"budgets": (0.05,)}, ValueError, "leaves none"),
        ({"budgets": ("x",)}, TypeError, "budget"),
        ({"budgets": ()}, ValueError, "no budgets"),
        ({"static": (), "random_masks": 0}, ValueError, "something to compare"),
        ({"static": (), "random_masks": 0, "budgets": None}, ValueError, "something to compare"),
        ({"static": ["bi"]}, ValueError, "block-influence or cka"),
        ({"static": ["cka", "cka"]}, ValueError, "two static masks"),
        ({"static": ["nowhere.json"]}, OSError, "nowhere.json"),
        ({"static": [StaticPolicy([0], num_layers=3, budget=1.0)]}, ValueError, "3 blocks"),
        ({"static": [StaticPolicy([0], num_layers=4, budget=1.0)]}, ValueError, "ranks 1 of 4 blocks, and 2"),
        ({"random_masks": -1}, ValueError, "random_masks"),
        ({"together": 0}, ValueError, "together"),
        ({"together": 2.0}, TypeError, "together"),
        ({"graders": "none"}, ValueError, "grader"),
        ({"graders": {}}, ValueError, "sums"),
        ({"routers": "/nowhere/at/all"}, OSError, "/nowhere/at/all"),
        ({"routers": (1, 1, 1, 1)}, ValueError, "budget"),
    ],
)
def test_refusals(model, items, options, kind, words, tmp_path):
    options = {"policy": options.pop("routers", None), **options}
    with pytest.raises(kind, match=words):
        run(model, items, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_no_items_and_items_twice_are_refused(model, items):
    with pytest.raises(ValueError, match="no items"):
        run(model, [])
    with pytest.raises(ValueError, match="id 'q0'"):
        run(model, [*items, items[0]])


def test_routers_of_another_model_are_refused(model, items, tmp_path):
    with pytest.raises(ValueError, match="not the model"):
        run(model, items, Thrifty(tiny("llama", seed=1)), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(model, items, policy, tmp_path):
    run(model, items[:2], policy, output=tmp_path / "a")
    before = (tmp_path / "a" / "results.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another model"):
        run(tiny("llama", seed=1), items[:2], output=tmp_path / "a")
    with pytest.raises(ValueError, match="float32, not bfloat16"):
        run(tiny("llama", dtype=torch.bfloat16), items[:2], output=tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="other results"):
        run(model, items[:2], output=tmp_path / "b")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        run(model, items[:2], output=tmp_path / "file")
    assert (tmp_path / "a" / "results.jsonl").read_bytes() == before
    (tmp_path / "a" / "results.jsonl").write_bytes(b"{]\n" + before)
    with pytest.raises(OSError, match="line 1 is damaged"):
        run(model, items[:2], output=tmp_path / "a")
    with pytest.raises(ValueError, match="no report of an evaluation"):
        EvaluationReport.read(tmp_path / "b" / "manifest.json")
