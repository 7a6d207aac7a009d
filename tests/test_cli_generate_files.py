"""`drllm-fast generate --input --output`: a file of prompts, on a tiny random Llama."""

import gzip
import json
import os
import signal
from pathlib import Path

import pytest
from cli_cases import LAYERS, TEMPLATE, call, file_answers, file_command, interrupted_at, refused, start, tiny_folder

from drllm_fast import cli_generate


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("chatty"), template=TEMPLATE)


def prompts_file(path, count=12, **more):
    """Rows of different lengths, half of them sampled, with fields of their own and some that are for nobody."""
    rows = [
        {
            "id": f"q{i}",
            "prompt": f"Prompt {i}" * (1 + i % 3),
            "source": "made up",
            "label": i,
            "max_new_tokens": 20 - i % 12,
        }
        | ({"temperature": 1.0} if i % 2 else {})
        | ({"path": [2, 1, 0, 1]} if i % 4 == 0 else {})
        | more
        for i in range(count)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_a_file_of_prompts(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import drllm_fast
    from drllm_fast import Sampling

    source, target = prompts_file(tmp_path / "in.jsonl.gz"), tmp_path / "out.jsonl"
    result = call(*file_command(tiny, source, target, "--keep", "label", "--seed", 5, "--batch-size", 4))
    assert result.exit_code == 0 and result.stdout == "", result.output
    found = file_answers(target)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    model.enable_dynamic_routing([1, 0, 1, 1])
    whole = drllm_fast.generate(
        model,
        tokenizer,
        [f"Prompt {i}" * (1 + i % 3) for i in range(12)],
        sampling=[Sampling(max_new_tokens=20 - i, temperature=float(i % 2), seed=5 + i) for i in range(12)],
        paths=[[2, 1, 0, 1] if i % 4 == 0 else [1, 0, 1, 1] for i in range(12)],
    )
    for i, answer in enumerate(whole):
        assert found[i + 1] == {
            "line": i + 1,
            "id": f"q{i}",
            "label": i,
            "text": answer.text,
            "tokens": answer.tokens,
            "path": list(answer.path),
            "visits": answer.visits,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
        }
    words = " ".join(result.stderr.split())
    tokens = sum(range(9, 21))
    assert f"12 12 {tokens} " in words and "3.25 of 4 81.2 % 2" in words and f"The answers are in {target}" in words


def test_answers_come_as_they_end_or_in_order(tiny, tmp_path):
    source = prompts_file(tmp_path / "in.jsonl")
    for name, more, order in (("out.jsonl", [], False), ("ordered.jsonl", ["--ordered"], True)):
        assert call(*file_command(tiny, source, tmp_path / name, "--batch-size", 4, *more)).exit_code == 0
        lines = [json.loads(line)["line"] for line in (tmp_path / name).read_text().splitlines()]
        assert (lines == sorted(lines)) is order
    assert file_answers(tmp_path / "out.jsonl") == file_answers(tmp_path / "ordered.jsonl")


def test_a_run_that_was_killed_goes_on(tiny, tmp_path):
    """SIGKILL while answers are written; then the same command, in the middle of whose first line it was."""
    source = prompts_file(tmp_path / "in.jsonl", count=40)
    target, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    code = (
        "import time; from drllm_fast import cli; from drllm_fast.generation.prompt_files import AnswerFile as File\n"
        "add = File.add\n"
        "def slow(self, *a):\n"
        "    add(self, *a); time.sleep(0.2)\n"
        "    if len(self.done) == 5: print('five', flush=True)\n"
        "File.add = slow; cli.main()"
    )
    process = start("-c", code, *file_command(tiny, source, target, "--batch-size", 4))
    interrupted_at(process, "five\n", signal.SIGKILL, 0.1)
    assert process.returncode == -signal.SIGKILL
    early = file_answers(target)
    assert 5 <= len(early) < 40
    with target.open("a") as file:
        file.write('{"line": 40, "id": "q39", "text": "cut sh')
    result = call(*file_command(tiny, source, target, "--batch-size", 8))  # what runs together decides nothing
    assert result.exit_code == 0 and f"{len(early)} of 40 prompts are answered" in " ".join(result.stderr.split())
    assert call(*file_command(tiny, source, whole)).exit_code == 0
    assert file_answers(target) == file_answers(whole) and len(file_answers(whole)) == 40
    begin = target.read_bytes()
    assert [json.loads(line)["line"] for line in begin.splitlines()[: len(early)]] == list(early)


@pytest.fixture
def interruptible():
    """Also where the tests are a background job, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_says_how_to_go_on(tiny, tmp_path, monkeypatch, interruptible):
    """In the middle of writing an answer, which is written all the same."""
    from drllm_fast.generation.prompt_files import AnswerFile

    source, target = prompts_file(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    add = AnswerFile.add
    with monkeypatch.context() as patch:

        def interrupted(self, *arguments):
            if len(self.done) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            add(self, *arguments)

        patch.setattr(AnswerFile, "add", interrupted)
        result = call(*file_command(tiny, source, target, "--batch-size", 2))
    words = " ".join(result.stderr.split())
    assert result.exit_code == 130 and "4 of 12 prompts are answered" in words and "run the same command" in words
    assert len(file_answers(target)) == 4
    assert call(*file_command(tiny, source, target)).exit_code == 0 and len(file_answers(target)) == 12


def test_nothing_left_to_do_loads_no_model(tiny, tmp_path, monkeypatch):
    source, target = prompts_file(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert call(*file_command(tiny, source, target)).exit_code == 0
    before = target.read_bytes()
    monkeypatch.setattr(cli_generate, "load_model", lambda *_: pytest.fail("loaded the model"))
    result = call(*file_command(tiny, source, target))
    assert result.exit_code == 0 and " 12 0 174 - " in " ".join(result.stderr.split()), result.output
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--policy", "skip:2"], "policy is 'skip:1', not 'skip:2'"),
        (["--max-new-tokens", "7"], "max_new_tokens is 6, not 7"),
        (["--seed", "1"], "seed is 0, not 1"),
        (["--top-k", "9"], "top_k is 0, not 9"),
        (["--stop", "x"], "stop is [], not ['x']"),
        (["--keep", "label"], "keep is [], not ['label']"),
        (["--ordered"], "ordered is False, not True"),
    ],
)
def test_answers_of_other_settings_stay(tiny, tmp_path, monkeypatch, more, words):
    source, target = prompts_file(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert call(*file_command(tiny, source, target)).exit_code == 0
    before = target.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(cli_generate, "load_model", lambda *_: pytest.fail("loaded the model"))
        refused(call(*file_command(tiny, source, target, *more)), "holds other answers", words, "--overwrite")
    assert target.read_bytes() == before
    assert call(*file_command(tiny, source, target, *more, "--overwrite")).exit_code == 0
    assert len(file_answers(target)) == 12 and target.read_bytes() != before


def test_answers_of_another_model_policy_or_input_stay(tiny, tmp_path):
    from drllm_fast.influence import StaticPolicy

    source, target = prompts_file(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    (tmp_path / "other").mkdir()
    policy = tmp_path / "policy.json"
    StaticPolicy([1, 2], num_layers=LAYERS, criterion="cka", budget=0.75).save(policy)
    assert call(*file_command(tiny, source, target, policy=policy)).exit_code == 0
    other = tiny_folder(tmp_path / "other", seed=1)
    refused(call(*file_command(other, source, target, policy=policy)), "model is", "Nothing was changed")
    refused(call(*file_command(tiny, source, target, "--dtype", "bfloat16", policy=policy)), "dtype is 'float32'")
    lines = target.read_text().splitlines(keepends=True)
    target.write_text("".join(lines[:-1]))  # something is left to do
    before = target.read_bytes()
    refused(call(*file_command(other, source, target, policy=policy)), "model is", "Nothing was changed")
    refused(
        call(*file_command(tiny, source, target, "--dtype", "bfloat16", policy=policy)),
        "dtype is 'float32', not 'bfloat16'",
    )
    StaticPolicy([1, 3], num_layers=LAYERS, criterion="cka", budget=0.75).save(
        policy
    )  # skips as much, and other blocks at other budgets
    refused(call(*file_command(tiny, source, target, policy=policy)), "policy_hash is")
    StaticPolicy([1, 2], num_layers=LAYERS, criterion="cka", budget=0.75).save(policy)
    prompts_file(source, count=13)
    refused(call(*file_command(tiny, source, target, policy=policy)), "prompts is")
    assert target.read_bytes() == before
    prompts_file(source)
    assert call(*file_command(tiny, source, target, policy=policy)).exit_code == 0 and len(file_answers(target)) == 12


def test_a_row_that_cannot_be_answered_leaves_all_as_it_was(tiny, tmp_path):
    """Those that only the model can refuse: the last row is looked at before the first is answered."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    for row, words in (
        ({"tokens": [1, 9999]}, "token ids must be from 0 to 257"),
        ({"prompt": "x" * 3000}, "leaves no room for an answer"),
        ({"prompt": "Hi", "path": [1, 1]}, "4 layers"),
        ({"prompt": "Hi", "budget": 0.5}, "keeps no budget"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no chat template"),
        ({"messages": [{"role": "user"}]}, "a message has a role and a content"),
    ):
        source.write_text(json.dumps({"prompt": "fine"}) + "\n\n" + json.dumps(row) + "\n")
        refused(call(*file_command(tiny, source, target)), f"{source}, line 3", words)
        assert not target.exists() and not Path(f"{target}.meta.json").exists()


def test_chats_in_a_file(chatty, tmp_path):
    rows = [{"prompt": "Hello"}, {"messages": [{"role": "user", "content": "Hello"}]}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for flag, tokens in (("--chat", [11, 11]), ("--no-chat", [5, 11])):
        target = tmp_path / f"{flag}.jsonl"
        assert call(*file_command(chatty, source, target, flag)).exit_code == 0
        assert [row["prompt_tokens"] for _, row in sorted(file_answers(target).items())] == tokens
        by_line = file_answers(target)
        assert (by_line[1]["tokens"] == by_line[2]["tokens"]) is (flag == "--chat")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompt", "Hi"], ["--prompt does not go with --input"]),
        (["--json"], ["--json does not go with --input"]),
        (["--keep", "nothing"], ["line 1: there is no field 'nothing' to keep", "label"]),
        (["--keep", "text"], ["'text' cannot be kept"]),
        (["--top-p", "0"], ["top_p must be above 0"]),
        (["--input", "nothere.jsonl"], ["nothere.jsonl"]),
        (["--output", "out.txt"], ["ends in .jsonl"]),
        (["--output", "in.jsonl"], ["is the file of the prompts"]),
        (["--output", "folder.jsonl"], ["is a folder"]),
        (["--output", "no/out.jsonl"], ["the folder no does not exist"]),
    ],
)
def test_bad_options_with_files(tiny, tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    source = prompts_file(Path("in.jsonl"))
    Path("folder.jsonl").mkdir()
    before = source.read_bytes()
    refused(call(*file_command(tiny, source, "out.jsonl", *more)), *words)
    assert source.read_bytes() == before and not Path("out.jsonl").exists()
