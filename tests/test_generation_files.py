"""Prompts and answers in files: what a row may say, and what a stopped run leaves behind."""

import gzip
import json
import os
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from drllm_fast.generation import Generation, Sampling
from drllm_fast.generation.prompt_files import AnswerFile, hash_policy, hash_tokens, read_rows
from drllm_fast.generation.prompt_rows import check_row, pool_tokens

MADE_OF = {"policy": "skip:1", "stop": ("x",), "seed": 0}


def answer(index=0, tokens=(5, 6), text="ab"):
    return Generation(index, text, list(tokens), (1, 0, 2, 1), 4, "length", 3, 512, 0.1, 0.2, 0.3456789)


def row_at(line, **fields):
    return check_row({"prompt": "Hi", **fields}, f"line {line}", line, Sampling())


def begun(path, *lines, overwrite=False, made_of=MADE_OF):
    """A file with answers to these lines, added to what is there."""
    with AnswerFile(path, overwrite=overwrite) as file:
        file.begin(made_of, {"model": "tiny"})
        for line in lines:
            file.add(row_at(line), answer())
    return file


# -- rows
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "has one of 'prompt', 'messages' and 'tokens', found none of them (its fields: none)"),
        ({"question": "Hi"}, "found none of them (its fields: question)"),
        ({"prompt": None}, "found none of them"),
        ({"prompt": "Hi", "tokens": [1]}, "found prompt and tokens"),
        ({"prompt": 3}, "'prompt' is 3; it must be a text"),
        ({"prompt": " \n"}, "a text that is not blank"),
        ({"messages": []}, "'messages' is []; it must be a list of messages"),
        ({"messages": ["Hi"]}, "a list of messages, objects with role and content"),
        ({"tokens": [1, "2"]}, "'tokens' is [1, '2']; it must be a list of token ids"),
        ({"tokens": [True]}, "a list of token ids"),
        ({"prompt": "Hi", "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prompt": "Hi", "max_new_tokens": "9"}, "max_new_tokens must be an integer, got '9'"),
        ({"prompt": "Hi", "temperature": float("nan")}, "temperature must be a finite number"),
        ({"prompt": "Hi", "top_k": -1}, "top_k must be at least 0"),
        ({"prompt": "Hi", "top_p": 0}, "top_p must be above 0"),
        ({"prompt": "Hi", "seed": 1.5}, "seed must be an integer"),
        ({"prompt": "Hi", "stop": [1]}, "stop must be texts"),
        ({"prompt": "Hi", "budget": 0}, "'budget' is 0; it must be a number above 0"),
        ({"prompt": "Hi", "budget": True}, "'budget' is True"),
        ({"prompt": "Hi", "path": [0, 3]}, "'path' is [0, 3]; it must be a list of 0 (skip)"),
        ({"prompt": "Hi", "path": "1,1"}, "'path' is '1,1'"),
        ({"prompt": "Hi", "path": [1, 1], "budget": 0.5}, "'budget' is 0.5; it must be left out"),
        ({"prompt": "Hi", "id": ["a"]}, "'id' is ['a']; it must be a text or a number"),
        ({"prompt": "Hi", "max_new_token": 3}, "no field is called 'max_new_token'; did you mean 'max_new_tokens'?"),
    ],
)
def test_rows_that_are_refused(row, words):
    with pytest.raises(ValueError) as error:
        check_row(row, "a.jsonl, line 7", 7, Sampling())
    assert str(error.value).startswith("a.jsonl, line 7: ") and words in str(error.value)


def test_what_a_row_says():
    defaults = Sampling(max_new_tokens=9, top_k=3, seed=4, stop=("end",))
    row = check_row({"prompt": "Hi", "question": 1, "seed": None}, "here", 2, defaults)
    assert (row.prompt, row.sampling, row.id, row.kept, row.line) == ("Hi", defaults, None, {}, 2)
    said = {"tokens": [3], "temperature": 1, "top_k": 0, "top_p": 0.5, "seed": 8, "stop": "x", "id": 0, "path": [1, 0]}
    row = check_row(said, "here", 2, defaults)
    assert row.sampling == Sampling(9, 1, 0, 0.5, 8, ("x",))
    assert (row.prompt, row.id, row.path, row.budget) == ([3], 0, (1, 0), None)


def test_a_field_that_is_kept():
    row = check_row({"prompt": "Hi", "prompt_id": 3, "none": None}, "here", 1, Sampling(), ["prompt_id", "none"])
    assert row.kept == {"prompt_id": 3, "none": None}
    check_row({"prompt": "Hi", "max_new_token": 1}, "here", 1, Sampling(), ["max_new_token"])  # meant as it is
    with pytest.raises(ValueError, match="here: there is no field 'label' to keep; the row has prompt"):
        check_row({"prompt": "Hi"}, "here", 1, Sampling(), ["label"])


def test_pools_hold_the_longest_and_no_more_than_all():
    assert pool_tokens([3, 5], [4, 4], blocks=10, positions=None, rows=2) == 20 * (7 + 9)
    assert pool_tokens([3] * 1000, [4] * 1000, blocks=10, positions=None, rows=2) == 2 * 10 * 1024
    assert pool_tokens([5000], [1000], blocks=10, positions=None, rows=1) == 20 * 6000
    assert pool_tokens([5000], [1000], blocks=10, positions=5100, rows=1) == 20 * 5100


# -- the file of prompts
def test_lines_are_counted_and_draw_apart(tmp_path):
    for path in (tmp_path / "in.jsonl", tmp_path / "in.jsonl.gz"):
        text = '{"prompt": "a"}\n\n{"prompt": "b", "seed": 3}\n{"prompt": "c"}\n'
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        rows, said = read_rows(path, Sampling(seed=10))
        assert [(row.line, row.sampling.seed) for row in rows] == [(1, 10), (3, 3), (4, 13)]
        assert rows[1].where == f"{path}, line 3"
    assert read_rows(tmp_path / "in.jsonl", Sampling(seed=99))[1] == said  # of the prompts alone
    (tmp_path / "in.jsonl").write_text(text.replace("c", "d"))
    assert read_rows(tmp_path / "in.jsonl", Sampling())[1] != said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no prompt in it"),
        (b"\n \n", "no prompt in it"),
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        (b'{"prompt": "a"}\n["prompt"]\n', "line 2: a JSON list; each line must hold one object"),
        (b'{"prompt": "a"}\n{"prompt": 1}\n', "line 2: 'prompt' is 1"),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "not UTF-8"),
    ],
)
def test_files_that_are_refused(tmp_path, content, words):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_rows(path, Sampling())
    assert words in str(error.value) and str(path) in str(error.value)


def test_names_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"read from \.jsonl or \.jsonl\.gz"):
        read_rows(tmp_path / "in.txt", Sampling())
    with pytest.raises(ValueError, match="'seconds' cannot be kept"):
        read_rows(tmp_path / "in.jsonl", Sampling(), ["label", "seconds"])
    for name, words in (("out.jsonl.gz", "ends in .jsonl"), ("no/out.jsonl", "does not exist"), ("", "ends in")):
        with pytest.raises(ValueError, match=words):
            AnswerFile(tmp_path / name)


# -- the file of answers
def test_an_answer_as_a_line(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path) as file:
        file.begin(MADE_OF, {"model": "tiny"})
        kept = check_row({"prompt": "Hi", "id": "ü", "label": None}, "here", 7, Sampling(), ["label"])
        file.add(kept, answer(text="né\u2028"))
        assert path.read_text(encoding="utf-8").endswith("\n")  # at once
        file.add(row_at(9, id="\ud800"), answer(text="b"))
    first, second = map(json.loads, path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    assert first == {
        "line": 7, "id": "ü", "label": None, "text": "né\u2028", "tokens": [5, 6], "path": [1, 0, 2, 1], "visits": 4,
        "finish_reason": "length", "prompt_tokens": 3, "seconds": 0.345679,
    }  # fmt: skip
    assert "né" in path.read_text(encoding="utf-8") and second["id"] == "\ud800"
    assert (file.done, file.tokens, dict(file.paths)) == ({7, 9}, 4, {(1, 0, 2, 1): 2})
    meta = json.loads(Path(f"{path}.meta.json").read_text())
    assert meta["made_of"] == {"policy": "skip:1", "stop": ["x"], "seed": 0} and meta["model"] == "tiny"


def test_answers_are_counted_when_a_run_goes_on(tmp_path):
    path = tmp_path / "out.jsonl"
    begun(path, 1, 2)
    file = begun(path, 5)
    assert (file.done, file.tokens, dict(file.paths)) == ({1, 2, 5}, 6, {(1, 0, 2, 1): 3})
    assert len(path.read_bytes().splitlines()) == 3


def test_a_line_that_was_cut_short_is_taken_off(tmp_path):
    """Wherever it was cut; a whole line without its end is no line yet."""
    path = tmp_path / "out.jsonl"
    begun(path, 1, 2, 3)
    whole = path.read_bytes()
    second = len(b"".join(whole.splitlines(keepends=True)[:2]))
    for cut in range(second + 1, len(whole), 17):
        path.write_bytes(whole[:cut])
        with AnswerFile(path) as file:
            assert file.done == {1, 2} and path.read_bytes() == whole[:cut]  # nothing is changed yet
            file.begin(MADE_OF, {})
            file.add(row_at(3), answer())
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    assert begun(path).done == {1, 2}


def test_answers_of_something_else_stay(tmp_path):
    path = tmp_path / "out.jsonl"
    begun(path, 1)
    before = path.read_bytes()
    with AnswerFile(path) as file, pytest.raises(ValueError, match="seed is 0, not 1. Nothing was changed"):
        file.compare({"seed": 1, "policy": "skip:1"})
    with AnswerFile(path) as file, pytest.raises(ValueError, match="policy is 'skip:1', not None"):
        file.begin({"policy": None}, {})
    with AnswerFile(path) as file:
        file.compare({"stop": ("x",), "later": 3})  # what is not known is not compared
    assert path.read_bytes() == before
    begun(path, 4, overwrite=True, made_of={"seed": 1})
    assert begun(path, made_of={"seed": 1}).done == {4}


@pytest.mark.parametrize("left", [None, b""])
def test_meta_data_without_answers_are_of_nothing(tmp_path, left):
    """A kill between the beginning of both files, or of a new run over an old one."""
    path = tmp_path / "out.jsonl"
    begun(path, 1)
    path.unlink() if left is None else path.write_bytes(left)
    assert begun(path, 2, made_of={"seed": 5}).done == {2}
    assert json.loads(Path(f"{path}.meta.json").read_text())["made_of"] == {"seed": 5}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("out.jsonl.meta.json", None, "is there, and not out.jsonl.meta.json"),
        ("out.jsonl.meta.json", b"{", "is damaged"),
        ("out.jsonl.meta.json", b"[]", "expected"),
        ("out.jsonl.meta.json", b'{"format": "drllm-fast answers", "format_version": 2}', "expected"),
        ("out.jsonl", b'{"line": 1}\n', "line 1 is damaged"),
        ("out.jsonl", b"\0\0\n", "line 1 is damaged"),
        ("out.jsonl", b'{"line": 1, "tokens": [], "path": [1]}\n' * 2, "line 2 is damaged.*a second answer to line 1"),
    ],
)
def test_files_that_are_not_what_a_run_left(tmp_path, name, content, words):
    path = tmp_path / "out.jsonl"
    begun(path, 1)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words) as error, AnswerFile(path):
        pass
    assert "--overwrite to begin anew" in str(error.value)
    assert begun(path, 2, overwrite=True).done == {2}  # the lock is free again


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "out.jsonl"
    code = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".out.jsonl.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OSError, match="another process writes answers into it"), AnswerFile(path, overwrite=True):
            pass
    finally:
        other.kill()
        other.communicate()
    assert begun(path, 1).done == {1}  # a lock of a killed process is none


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_says_what_to_do(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path) as file:
        file.begin(MADE_OF, {})
        file.add(row_at(1), answer())
        with open("/dev/full", "ab", buffering=0) as full:
            own, file._file = file._file, full
            with pytest.raises(OSError, match="make room and run the same command again"):
                file.add(row_at(2), answer())
            file._file = own
    assert begun(path).done == {1}


def test_a_write_that_takes_a_part_is_gone_on_with(tmp_path):
    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:7])

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = tmp_path / "out.jsonl"
    with AnswerFile(path) as file:
        file.begin(MADE_OF, {})
        file._file = Slow(file._file)
        file.add(row_at(1), answer())
    assert json.loads(path.read_text())["text"] == "ab"


def test_a_folder_that_cannot_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="choose another"), AnswerFile(tmp_path / "out.jsonl"):
            pass
    finally:
        tmp_path.chmod(0o700)


# -- hashes
def test_hashes_change_with_what_decides():
    import torch

    from drllm_fast import LayerRouters, StaticPolicy
    from drllm_fast.policies import GivenPlan

    torch.manual_seed(0)
    routers = LayerRouters(num_layers=2, hidden_size=4)
    policies = [
        None,
        GivenPlan([1, 0]),
        GivenPlan([1, 2]),
        StaticPolicy([0], num_layers=2, criterion="cka", budget=0.5),
        StaticPolicy([1], num_layers=2, criterion="cka", budget=0.5),
        StaticPolicy([1, 0], num_layers=2, criterion="cka", budget=0.5),
        routers,
    ]
    hashes = [hash_policy(policy) for policy in policies]
    assert hash_policy(GivenPlan([1, 0])) == hashes[1]
    routers.knob = 0.25
    hashes.append(hash_policy(routers))
    with torch.no_grad():
        next(routers.parameters()).view(-1)[0] += 1
    hashes.append(hash_policy(routers))
    assert len(set(hashes)) == len(hashes)
    some = [array("q", [1, 2]), array("q", [3])]
    assert hash_tokens(some) == hash_tokens(list(some)) != hash_tokens([array("q", [1]), array("q", [2, 3])])
