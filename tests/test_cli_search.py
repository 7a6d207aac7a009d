"""`drllm-fast search` from the command line to the report, on a tiny random Llama."""

import json
import sys

import pytest
from cli_cases import (
    LAYERS,
    TEMPLATE,
    call,
    contents,
    ended,
    free,
    quiz,
    refused,
    results,
    tiny_folder,
    without_cost,
)  # fmt: skip

from drllm_fast import cli_search
from drllm_fast.search.manifest import read
from drllm_fast.search.tasks import load_task

QUICK = ("--simulations", 10, "--threads", 1)
pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        "tiny": tiny_folder(tmp_path_factory.mktemp("tiny")),
        "chatty": tiny_folder(tmp_path_factory.mktemp("chatty"), template=TEMPLATE),
        "other": tiny_folder(tmp_path_factory.mktemp("other"), seed=1),
    }


def search(model, task, output, *more):
    return call("search", "--model", model, "--task", task, "--output", output, *QUICK, *more)


# -- a search and its files
def test_a_search_ends_with_its_report(models, tmp_path):
    datasets = pytest.importorskip("datasets")
    task, output = quiz(tmp_path / "quiz.jsonl"), tmp_path / "out"
    first = ended(search(models["tiny"], task, output))
    assert "5 prompts, 0 of them searched before" in first.stderr and "report.json" in first.stderr
    assert "dense path" in first.stdout and (output / "report.md").read_text().count("|") > 50
    report = json.loads((output / "report.json").read_text())
    rows = datasets.load_dataset("parquet", data_files=str(output / "paths.parquet"), cache_dir=tmp_path / "c")["train"]
    items = {item.id: item for item in load_task(str(task))}
    assert len(rows) == len(items) == 5
    for row in rows:
        item = items[row["item"]]
        assert (row["prompt"], row["choices"], row["answer"]) == (item.prompt, list(item.choices), str(item.answer))
        assert row["paths"][0] == "1" * LAYERS and len(row["paths"]) <= 11 and row["best"] in row["paths"]
    assert read(output).config["simulations"] == 10 and read(output).seed == 0

    second = ended(search(models["tiny"], task, output))
    assert "5 prompts, 5 of them searched before" in second.stderr and second.stdout == first.stdout
    assert json.loads((output / "report.json").read_text()) == report


def test_a_limit_may_be_raised(models, tmp_path):
    task, output = quiz(tmp_path / "quiz.jsonl"), tmp_path / "out"
    ended(search(models["tiny"], task, output, "--limit", 2))
    assert [r["key"]["item"] for r in results(output)] == ["q0", "q1"]
    assert "5 prompts, 2 of them searched before" in ended(search(models["tiny"], task, output)).stderr
    whole = tmp_path / "whole"
    ended(search(models["tiny"], task, whole))
    assert without_cost(results(output)) == without_cost(results(whole))


@pytest.mark.parametrize("method", [method.value for method in cli_search.Method])
def test_methods_and_rewards(models, tmp_path, method):
    """Every method once, and every reward once, on a store of Parquet."""
    number = [method.value for method in cli_search.Method].index(method)
    rewards = [reward.value for reward in cli_search.Reward]
    reward = rewards[number % len(rewards)]
    more = ["--method", method, "--reward", reward, "--store", "parquet", "--together", 2]
    result = ended(search(models["tiny"], quiz(tmp_path / "quiz.jsonl", 3), tmp_path / "out", *more))
    assert method in result.stdout and reward in result.stdout and "(parquet)" in result.stderr
    found = results(tmp_path / "out")
    assert len(found) == 3 and all(len(r["paths"]) > 1 for r in found)
    if reward == "loglik":
        assert all(r["rewards"] == [s[int(r["answer"])] for s in r["scores"]] for r in found)


def test_a_prior_changes_the_search(models, tmp_path):
    task = quiz(tmp_path / "quiz.jsonl", 3)
    for prior in ("none", "cka", "block-influence"):
        ended(search(models["tiny"], task, tmp_path / prior, "--prior", prior, "--no-early-stop"))
    none, *priors = [[r["paths"] for r in results(tmp_path / name)] for name in ("none", "cka", "block-influence")]
    assert none not in priors


def test_options_reach_the_method(models, tmp_path):
    task = quiz(tmp_path / "quiz.jsonl", 2)
    more = ["--method", "beam", "--option", "width=1", "--option", "depth=2", "--no-control", "--probes", 2]
    ended(search(models["tiny"], task, tmp_path / "out", *more, "--max-length", 1, "--state-memory", 0))
    assert read(tmp_path / "out").config["options"] == {"width": 1, "depth": 2}
    for result in results(tmp_path / "out"):
        assert result["control_target"] is None and len(result["probes"]) == 2
        assert all(sum(map(int, path)) <= LAYERS for path in result["paths"])


def test_free_answers_take_the_grader_of_their_form(models, tmp_path):
    pytest.importorskip("math_verify")
    for name, form, grader in (("plain", None, "exact"), ("mathematics", "svamp", "math-verify")):
        task = free(tmp_path / f"{name}.jsonl", **({"form": form} if form else {}))
        ended(search(models["tiny"], task, tmp_path / name, "--max-new-tokens", 3, "--simulations", 4))
        assert read(tmp_path / name).grader == grader
        found = results(tmp_path / name)
        assert [r["answer"] for r in found] == ["1", "2", "3"] and all(r["choices"] is None for r in found)
        assert all(len(text) <= 3 for r in found for text in r["predictions"])
        assert all(r["grader"].startswith(grader) for r in found)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text((tmp_path / "plain.jsonl").read_text() + '{"question": "?", "answer": "1", "form": "svamp"}\n')
    refused(search(models["tiny"], mixed, tmp_path / "mixed"), "different graders (exact, math-verify)", "--grader")
    more = ("--max-new-tokens", 2, "--simulations", 2)
    ended(search(models["tiny"], mixed, tmp_path / "mixed", "--grader", "exact", *more))


def test_chat(models, tmp_path):
    task = quiz(tmp_path / "quiz.jsonl", 2)
    ended(search(models["chatty"], task, tmp_path / "chat", "--chat"))
    for result in results(tmp_path / "chat"):
        assert result["prompt"].startswith("<u>Question: W") and result["prompt"].endswith("<a>")
        assert not any(choice.startswith(" ") for choice in result["choices"])
    refused(search(models["chatty"], task, tmp_path / "chat"), "task.chat is True, not False")
    refused(search(models["tiny"], task, tmp_path / "no", "--chat"), "--chat: the tokenizer of", "no chat template")
    assert not (tmp_path / "no").exists()


def test_other_columns_levels_and_examples(models, tmp_path):
    task = quiz(tmp_path / "quiz.jsonl")
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text(task.read_text().replace('"question"', '"ask"').replace('"choices"', '"options"'))
    fields = ["--field", "question=ask", "--field", "choices=options", "--field", "answer=answer"]
    more = ["--shots", 1, "--examples", task, "--form", "letters"]
    ended(search(models["tiny"], renamed, tmp_path / "a", *fields, "--limit", 1, "--simulations", 2))
    ended(search(models["tiny"], task, tmp_path / "b", "--levels", "2", *more))
    (renamed_row,), two = results(tmp_path / "a"), results(tmp_path / "b")
    assert renamed_row["prompt"].startswith("Question: W") and len(renamed_row["choices"]) == 4
    assert [(r["key"]["item"], r["level"]) for r in two] == [("q1", 2), ("q3", 2)]
    assert all(r["choices"] == [" A", " B", " C", " D"] and r["prompt"].count("Answer:") == 2 for r in two)


# -- what is refused
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--simulations", 11], ["config.simulations is 10, not 11"]),
        (["--reward", "margin"], ["config.reward is 'exact', not 'margin'"]),
        (["--seed", 3], ["seed is 0, not 3"]),
        (["--levels", "1"], ["task.levels is None, not '1'"]),
        (["--option", "widening=2"], ["config.options.widening is None, not 2"]),
        (["--store", "parquet"], ["is a store of kind sqlite, not parquet"]),
    ],
)
def test_a_folder_is_of_one_search(done, more, words):
    models, task, output = done
    before = contents(output)
    result = search(models["tiny"], task, output, *more)
    refused(result, str(output), *words)
    assert len(result.stderr.strip().splitlines()) == 1 and contents(output) == before


@pytest.fixture(scope="module")
def done(models, tmp_path_factory):
    """A folder that holds a finished search."""
    folder = tmp_path_factory.mktemp("done")
    task, output = quiz(folder / "quiz.jsonl", 3), folder / "out"
    ended(search(models["tiny"], task, output))
    return models, task, output


def test_another_model_other_content_and_other_folders_are_refused(done, tmp_path):
    models, task, output = done
    before = contents(output)
    refused(search(models["other"], task, output), "holds another search: model: LlamaForCausalLM is not the model")
    other = quiz(tmp_path / task.name, 3, seed=5)
    refused(search(models["tiny"], other, output), "task.content is")
    more = quiz(tmp_path / task.name, 4)
    refused(search(models["tiny"], more, output), "task.content is")
    assert contents(output) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "page.txt").write_text("mine")
    refused(search(models["tiny"], task, tmp_path / "thesis"), "not empty and no output of a search", "page.txt")
    assert contents(tmp_path / "thesis") == {"page.txt": b"mine"}
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / task.name).write_bytes(task.read_bytes())
    assert "3 of them searched before" in ended(search(models["tiny"], moved / task.name, output)).stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--option", "width=2"], ["method 'mcts' has no option 'width'", "widening"]),
        (["--option", "width"], ["--option width: write NAME=VALUE"]),
        (["--method", "beam", "--option", "width=0"], ["'width' of method 'beam' must be 1 or more"]),
        (["--method", "sideways"], ["--method", "sideways"]),
        (["--simulations", "-1"], ["--simulations"]),
        (["--exploration", "inf"], ["exploration must be a finite number"]),
        (["--max-length", "3"], ["--max-length"]),
        (["--seed", 2**63], ["--seed"]),
        (["--grader", "teacher"], ["unknown grader 'teacher'", "math-verify"]),
        (["--prior", "hunch"], ["--prior hunch: write none, block-influence, cka or kl"]),
        (["--levels", "easy"], ["levels 'easy'; write them as"]),
        (["--levels", "7"], ["no rows of the levels [7]; there are [1, 2]"]),
        (["--shots", "9"], ["9 solved examples were asked for", "--examples"]),
        (["--form", "sonnet"], ["no prompt form for the task 'sonnet'", "--form question"]),
        (["--field", "question"], ["--field question: write NAME=VALUE"]),
        (["--executor", "torchrun"], ["RANK and WORLD_SIZE are not set", "torchrun --nproc-per-node"]),
        (["--workers", "2"], ["--workers and --ray-address are of --executor ray"]),
        (["--device", "cuda:99"], ["CUDA devices"]),
    ],
)
def test_bad_options_end_before_the_model_is_loaded(tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(cli_search, "load_model", None)
    monkeypatch.setattr(cli_search, "check_model", lambda name: None)
    monkeypatch.delenv("RANK", raising=False)
    refused(search("tiny", quiz(tmp_path / "quiz.jsonl"), tmp_path / "out", *more), *words)
    assert not (tmp_path / "out").exists()


def test_bad_tasks_end_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_search, "load_model", None)
    monkeypatch.setattr(cli_search, "check_model", lambda name: None)
    output = tmp_path / "out"
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"question": "?", "answer": "1"}\n{"question"\n')
    (tmp_path / "unanswered.jsonl").write_text('{"question": "?", "answer": ""}\n')
    for task, words in (
        (tmp_path / "nothing.jsonl", "there is no file"),
        (tmp_path / "empty.jsonl", "no rows: the data set is empty"),
        (tmp_path / "broken.jsonl", "broken.jsonl, line 2: not JSON"),
        (tmp_path / "unanswered.jsonl", "--drop-unanswered"),
        ("arc_esay", "unknown task 'arc_esay'; known are"),
        ("synth_arith:9", "unknown level 9"),
    ):
        result = search("tiny", task, output)
        refused(result, words)
        assert len(result.stderr.strip().splitlines()) == 1
    refused(search("tiny", free(tmp_path / "free.jsonl"), output, "--reward", "margin"), "margin compares choices")
    refused(search("tiny", free(tmp_path / "free.jsonl"), tmp_path / "free.jsonl"), "is a file; give a folder")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        refused(search("tiny", quiz(tmp_path / "quiz.jsonl"), output), 'pip install "drllm-fast[search]"')
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "drllm_fast.search.ray_executor", raising=False)
    refused(search("tiny", quiz(tmp_path / "quiz.jsonl"), output, "--executor", "ray"), "drllm-fast[ray]")
    assert not output.exists()


def test_ranks_report_once(models, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    task, reports = quiz(tmp_path / "quiz.jsonl", 3), []
    for rank in (0, 1, 0, 1):  # the third and fourth find nothing to do
        monkeypatch.setenv("RANK", str(rank))
        reports.append(bool(ended(search(models["tiny"], task, tmp_path / "out", "--executor", "torchrun")).stdout))
    assert reports == [False, True, True, False]
    refused(search(models["tiny"], task, tmp_path / "out"), "add --executor torchrun")


def test_a_prompt_that_fails_leaves_the_others_and_their_report(models, tmp_path):
    task = quiz(tmp_path / "quiz.jsonl", 3)
    long = {"id": "long", "question": "why " * 600, "choices": ["a", "b"], "answer": 0}
    task.write_text(task.read_text() + json.dumps(long) + "\n")
    for stored in (0, 3):
        result = search(models["tiny"], task, tmp_path / "out")
        assert result.exit_code == 1 and f"4 prompts, {stored} of them searched before" in result.stderr
        assert "1 units failed" in result.stderr and "quiz/long: ValueError: a prompt of" in result.stderr
        assert "dense path" in result.stdout and len(results(tmp_path / "out")) == 3
