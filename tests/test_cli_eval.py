"""`drllm-fast eval` from the command line to the report, on a tiny random Llama."""

import gzip
import json

import pytest
import torch
from cli_cases import LAYERS, TEMPLATE, call, contents, ended, free, quiz, refused, tiny_folder
from transformers import AutoModelForCausalLM

from drllm_fast import LayerRouters
from drllm_fast.budget import BudgetTable
from drllm_fast.evaluation import outcomes
from drllm_fast.influence import StaticPolicy

PLENTY = ("--budgets", "1,0.75,0.5", "--threads", 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        "tiny": tiny_folder(tmp_path_factory.mktemp("tiny")),
        "chatty": tiny_folder(tmp_path_factory.mktemp("chatty"), template=TEMPLATE),
        "other": tiny_folder(tmp_path_factory.mktemp("other"), seed=1),
    }


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return quiz(tmp_path_factory.mktemp("tasks") / "quiz.jsonl")


def evaluate(model, tasks, output, *more):
    tasks = tasks if isinstance(tasks, list) else [tasks]
    return call("eval", "--model", model, *(x for t in tasks for x in ("--task", t)), "--output", output, *more)


def figures(folder):
    return json.loads((folder / "report.json").read_text())


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_an_evaluation_ends_with_its_report(models, task, tmp_path):
    sums, output = free(tmp_path / "sums.jsonl"), tmp_path / "out"
    StaticPolicy([2, 1, 0], num_layers=LAYERS, budget=0.5).save(tmp_path / "mine.json")
    static = ("--static", "block-influence", "--static", tmp_path / "mine.json", "--random", 2, "--oracle")
    first = ended(evaluate(models["tiny"], [task, sums], output, *static, *PLENTY, "--max-new-tokens", 2))
    assert "QUIZ: ACCURACY" in first.stdout and "SUMS: ACCURACY" in first.stdout and "MEAN OF 2 TASKS" in first.stdout
    assert "8 prompts in" in first.stderr and "report.html" in first.stderr
    made = figures(output)
    names = {(row["kind"], row["name"], row["budget"]) for row in made["tasks"][0]["rows"]}
    expected = {("dense", "dense", None)}
    for budget in (1.0, 0.75, 0.5):
        expected |= {("static", "block-influence", budget), ("static", "mine", budget)}
        expected |= {("random", "random", budget), ("oracle", "oracle", budget)}
    assert names == expected and made["graders"] == {"sums": "exact 1"} and made["model"] == models["tiny"].name
    visits = {row["budget"]: row["visits"] for row in made["tasks"][0]["rows"] if row["name"] == "mine"}
    assert visits == {1.0: 4, 0.75: 3, 0.5: 2}
    assert {"1111", "1101", "1001"} <= lines(output)[0]["outcomes"].keys()
    answers = [outcome["answer"] for line in lines(output)[5:] for outcome in line["outcomes"].values()]
    assert answers and all(len(answer) <= 2 for answer in answers)  # two tokens, of a byte each

    before = contents(output)
    second = ended(evaluate(models["tiny"], [task, sums], output, *static, *PLENTY, "--max-new-tokens", 2))
    assert second.stdout == first.stdout and contents(output) == before


def test_routers_beside_masks_of_their_size(models, task, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(models["tiny"])
    routers = LayerRouters.for_model(loaded, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routers.w2 *= 40
    routers.calibration = BudgetTable((0.5, 1.0), (3.0, 0.0))
    routers.save_pretrained(tmp_path / "routers")
    more = ("--routers", tmp_path / "routers", "--static", "cka", *PLENTY)
    result = ended(evaluate(models["tiny"], task, tmp_path / "out", *more))
    assert "QUIZ: ROUTERS AGAINST A STATIC MASK" in result.stdout
    rows = figures(tmp_path / "out")["tasks"][0]["rows"]
    pairs = [[row for row in rows if row["budget"] == budget] for budget in (1.0, 0.75, 0.5)]
    for routed, static in pairs:
        assert (routed["kind"], static["kind"]) == ("routers", "static") and routed["versus_static"]["name"] == "cka"
        assert static["visits"] == pytest.approx(min(LAYERS, max(1, routed["visits"])))
    assert pairs[0][0]["visits"] > pairs[2][0]["visits"]


def test_only_the_dense_model(models, task, tmp_path):
    result = ended(evaluate(models["tiny"], task, tmp_path / "out", "--limit", 3))
    [row] = figures(tmp_path / "out")["tasks"][0]["rows"]
    assert row["kind"] == "dense" and row["versus_dense"] is None and "AGAINST" not in result.stdout
    assert [line["item"] for line in lines(tmp_path / "out")] == ["q0", "q1", "q3"]


def test_running_text_has_a_perplexity(models, tmp_path):
    text = " ".join(f"word{i}" for i in range(150))
    with gzip.open(tmp_path / "some.txt.gz", "wt") as file:
        file.write(text)
    result = ended(evaluate(models["tiny"], f"text:{tmp_path / 'some.txt.gz'}", tmp_path / "out", "--random", 1))
    [task] = figures(tmp_path / "out")["tasks"]
    assert task["measure"] == "perplexity" and task["tokens"] > 100 and "TEXT: PERPLEXITY" in result.stdout
    assert "word" not in (tmp_path / "out" / "report.html").read_text()


def test_chat_and_shots_change_the_prompts(models, task, tmp_path):
    seen = set()
    for name, more in (
        ("plain", ()),
        ("chat", ("--chat",)),
        ("shots", ("--shots", 1)),
        ("form", ("--form", "letters")),
    ):
        ended(evaluate(models["chatty"], task, tmp_path / name, *more, "--limit", 1))
        seen |= {line["prompt"] for line in lines(tmp_path / name)}
    assert len(seen) == 4


def test_levels_and_graders(models, task, tmp_path):
    ended(evaluate(models["tiny"], task, tmp_path / "levels", "--levels", 2))
    assert [line["item"] for line in lines(tmp_path / "levels")] == ["q1", "q3"]
    sums = free(tmp_path / "sums.jsonl", form="lambada_openai")
    ended(evaluate(models["tiny"], sums, tmp_path / "auto", "--limit", 1))
    ended(evaluate(models["tiny"], sums, tmp_path / "exact", "--limit", 1, "--grader", "exact"))
    assert lines(tmp_path / "auto")[0]["grader"].startswith("first-word")
    assert lines(tmp_path / "exact")[0]["grader"].startswith("exact")


@pytest.mark.parametrize(
    "more, words",
    [
        (("--budgets", "0.9"), ("--budgets", "nothing to compare")),
        (("--oracle",), ("--oracle", "nothing to compare")),
        (("--random", 1, "--budgets", "1.5"), ("--budgets 1.5", "at most 1")),
        (("--random", 1, "--budgets", "0.9;0.8"), ("--budgets 0.9;0.8", "shares of the layers")),
        (("--static", "bi"), ("--static bi", "block-influence or cka")),
        (("--static", "none.json"), ("--static none.json", "no such file")),
        (("--routers", "nowhere"), ("--routers nowhere", "no such folder")),
        (("--routers", "."), ("config.json is missing",)),
        (("--grader", "best"), ("unknown grader 'best'",)),
        (("--chat",), ("no chat template",)),
        (("--device", "tpu"), ("--device tpu",)),
        (("--static", "cka", "--budgets", "0.1"), ("leaves none of 4 blocks",)),
        (("--levels", "7"), ("no rows of the levels",)),
    ],
)
def test_refusals(models, task, tmp_path, more, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(evaluate(models["tiny"], task, tmp_path / "out", *more), *words)
    assert not (tmp_path / "out").exists()


def test_unknown_tasks_and_tasks_given_twice(models, task, tmp_path):
    refused(evaluate(models["tiny"], "nonsense", tmp_path / "out"), "unknown task 'nonsense'")
    refused(evaluate(models["tiny"], [task, task], tmp_path / "out"), "the id 'q0'")
    refused(evaluate(tmp_path, task, tmp_path / "out"), "config.json")
    assert not (tmp_path / "out").exists()


def test_another_model_or_checkpoint_is_refused(models, task, tmp_path):
    ended(evaluate(models["tiny"], task, tmp_path / "out", "--limit", 1))
    before = contents(tmp_path / "out")
    refused(evaluate(models["other"], task, tmp_path / "out"), "another model")
    refused(evaluate(models["tiny"], task, tmp_path / "out", "--dtype", "bfloat16"), "float32, not bfloat16")
    assert contents(tmp_path / "out") == before
    LayerRouters.for_model(AutoModelForCausalLM.from_pretrained(models["other"])).save_pretrained(tmp_path / "routers")
    refused(evaluate(models["tiny"], task, tmp_path / "new", "--routers", tmp_path / "routers"), "is not the model")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    refused(evaluate(models["tiny"], task, tmp_path / "file"), "is a file")


def test_ctrl_c_loses_nothing_that_was_scored(models, task, tmp_path, monkeypatch):
    add, calls = outcomes.Results.add, []

    def interrupted(self, found):
        calls.append(found)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(outcomes.Results, "add", interrupted)
        result = evaluate(models["tiny"], task, tmp_path / "out", "--together", 1, "--random", 1, *PLENTY)
    assert result.exit_code == 130 and "2 of 5 items are scored" in result.stderr
    assert [line["item"] for line in lines(tmp_path / "out")] == ["q0", "q1"]
    ended(evaluate(models["tiny"], task, tmp_path / "out", "--random", 1, *PLENTY))
    assert [line["item"] for line in lines(tmp_path / "out")] == ["q0", "q1", "q2", "q3", "q4"]
    ended(evaluate(models["tiny"], task, tmp_path / "whole", "--random", 1, *PLENTY))
    assert figures(tmp_path / "whole")["tasks"] == figures(tmp_path / "out")["tasks"]
