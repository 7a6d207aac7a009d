"""Graders: what is right, where they differ, and that no answer makes them hang or fall."""

import importlib.util
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from drllm_fast.search import grading, grading_process
from drllm_fast.search.grading import (
    GRADERS,
    as_number,
    cut_at_stop,
    final_answer,
    grade,
    grader_version,
    last_boxed,
    normalise,
)
from drllm_fast.search.unit import Item


def item(answer: str, *aliases: str, **more) -> Item:
    return Item("i", "t", "p", None, answer, aliases, **more)


def needs(kind: str) -> str:
    for package in GRADERS[kind]:
        pytest.importorskip(package)
    return kind


CASES = [  # text, answer, right for math-verify, for mathruler
    ("So it is \\boxed{10}.", "10", True, True),
    ("So it is \\boxed{11}.", "10", False, False),
    ("\\boxed{0.5}", "\\frac{1}{2}", True, True),
    ("\\boxed{4i + 8}", "8+4i", True, True),
    ("\\boxed{\\text{Evelyn}}", "Evelyn", True, True),
    ("\\boxed{(1, 2)}", "(1,2)", True, True),
    ("\\boxed{(2, 1)}", "(1,2)", False, False),
    ("\\boxed{x = 5}", "5", True, True),
    ("\\boxed{1,000}", "1000", True, True),
    ("\\boxed{10\\%}", "10", True, True),
    ("\\boxed{10}", "10\\%", True, True),
    ("no idea", "10", False, False),
    ("", "10", False, False),
    # Where they differ: no box ...
    (" 10", "10", True, False),
    ("The answer is 10.", "10", True, False),
    ("#### 10", "10", True, False),
    ("10%", "10", True, False),
    # ... percent as a share ...
    ("\\boxed{0.1}", "10\\%", True, False),
    # ... a fraction that is not reduced, two boxes, and an expression instead of its value.
    ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", True, False),
    ("\\boxed{3} or \\boxed{4}", "4", False, True),
    ("3 + 7", "10", True, False),
]


@pytest.mark.parametrize("kind", ["math-verify", "mathruler"])
@pytest.mark.parametrize(("text", "answer", "by_math_verify", "by_mathruler"), CASES)
def test_mathematics(text, answer, by_math_verify, by_mathruler, kind):
    assert grade(needs(kind), text, item(answer)) is (by_math_verify if kind == "math-verify" else by_mathruler)


def test_mathruler_is_called_as_the_authors_call_it():
    needs("mathruler")
    from mathruler.grader import extract_boxed_content, grade_answer

    for text, answer, *_ in CASES:
        assert grading_process.ask("mathruler", text, answer) is grade_answer(extract_boxed_content(text), answer)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" 10", "10", True),
        ("10\n\n3 + 4 = 7", "10", True),
        ("3 + 7 = 10", "10", True),
        ("3 + 7", "10", False),
        ("it is $1,000.00!", "1000", True),
        ("10 and then 11", "10", False),
        ("Reasons: 3 + 4 = 7.\n#### 1,007\n", "1007", True),
        ("#### 7 of 9", "9", True),
        ("\\boxed{7} not 8", "7", True),
        ("-5", "5", False),
        ("0010", "10", True),
        (" The  Queen. ", "the queen", True),
        ("“Queen”", "Queen", True),
        ("ＱＵＥＥＮ", "queen", True),
        ("Queens", "Queen", False),
        ("\n\nQueen\nKing", "Queen", True),
        ("King\nQueen", "Queen", False),
        ("the 10th", "10th century", False),
        ("", "Queen", False),
        ("1e999999999", "7", False),
        ("٣", "3", True),
    ],
)
def test_exact(text, answer, right):
    assert grade("exact", text, item(answer)) is right


def test_aliases_stops_and_choices():
    assert grade("exact", "the 10th", item("10th century", "10th", "the 10th"))
    assert not grade("exact", "the 11th", item("10th century", "10th"))
    assert grade("exact", "4 = 4\n5 + 5 = 10", item("4", stop=("\n",)))
    assert not grade("exact", "Question: 4", item("4", stop=("\n", "Question:")))
    assert cut_at_stop("a b\nc", ("\n", " b", "x")) == "a" and cut_at_stop("a", ()) == "a"
    assert grade("first-word", " Queen and her", item("queen"))
    assert grade("first-word", "\n“Queen,” he", item("Queen"))
    assert not grade("first-word", " the Queen", item("Queen"))
    assert not grade("first-word", " ", item("Queen"))
    several = Item("i", "t", "p", (" ice", " water"), 1)
    assert grade("exact", "Water.", several) and not grade("exact", "ice", several)
    if all(map(importlib.util.find_spec, GRADERS["math-verify"])):
        assert grade("math-verify", "\\boxed{4}", item("3", "4", ""))


def test_parts_of_an_answer():
    assert last_boxed("\\boxed{1} \\boxed{\\frac{1}{2}} \\boxed{3") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{" * 3) is None and last_boxed("boxed{1}") is None
    assert final_answer("a #### b\n c") == "b" and final_answer("x\ny 1 2", number=True) == "2"
    assert normalise(" $Ab  C.\n") == "ab c"
    assert as_number("$1,234.50") == as_number("1234.5") and as_number("1,23") is None and as_number("1 2") is None


def garbage() -> list[str]:
    draw = random.Random(0)
    return [
        "",
        "{" * 5000,
        "(" * 5000,
        "\\boxed{" * 1500,
        "\\boxed{" * 1000 + "1" + "}" * 1000,
        "\\frac{" * 2000,
        "1" * 20_000,
        "\\boxed{" + "9" * 5000 + "}",
        "1," * 5000,
        "= " * 5000,
        "$" * 10_000,
        "1e999999999",
        "\x00\ud800\n\r\u2028",
        "9^" * 3000,
        "".join(chr(draw.randrange(32, 127)) for _ in range(10_000)),
        "".join(chr(draw.randrange(1, 0x3000)) for _ in range(10_000)),
    ]


@pytest.mark.parametrize("kind", GRADERS)
def test_garbage_is_wrong_and_fast(kind):
    needs(kind)
    for text in garbage():
        start = time.monotonic()
        assert grade(kind, text, item("\\frac{1}{2}")) is False, text[:40]
        assert time.monotonic() - start < grading_process.LIMIT + 5, text[:40]


@pytest.mark.parametrize("text", ["9**9**9**9", "\\boxed{9^{9^{9^9}}}", "\\boxed{100000000!}", "\\boxed{10^{10^{10}}}"])
def test_numbers_beyond_all_bounds_end_at_the_limit(text, monkeypatch):
    needs("math-verify")
    monkeypatch.setattr(grading_process, "LIMIT", 1.0)
    grade("math-verify", "\\boxed{3}", item("4"))  # starts the process
    start = time.monotonic()
    assert grade("math-verify", text, item("3")) is False
    assert time.monotonic() - start < 8
    assert grade("math-verify", "$3$", item("3")) is True  # by the next process


def test_threads_forks_and_repeated_answers(monkeypatch):
    needs("math-verify")
    verdicts = {}

    def work(index):
        verdicts[index] = [grade("math-verify", f"$ {index} + {n} $", item(str(index + n))) for n in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {index: [True] * 5 for index in range(6)}
    asked = []
    monkeypatch.setattr(grading_process, "ask", lambda *args: asked.append(args) or False)
    for _ in range(3):
        grade("math-verify", "asked but once", item("77"))
    grade("math-verify", "a" * 20_000 + "b", item("78"))
    assert len(asked) == 2 and asked[1][1] == "a" * 9_999 + "b"
    assert grade("math-verify", "\\boxed{an unknown thing}", item("an unknown thing")) and len(asked) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_asks_a_process_of_its_own(tmp_path):
    needs("math-verify")
    code = (
        "import os; from drllm_fast.search.grading_process import ask, _graders\n"
        "assert ask('math-verify', '$4$', '4'); first = _graders['math-verify'].process.pid\n"
        "child = os.fork()\n"
        "right = ask('math-verify', '$5$' if child else '$6$', '5' if child else '6')\n"
        "own = _graders['math-verify'].process.pid == first\n"
        "if not child: os._exit(0 if right and not own else 1)\n"
        "print(right, own, os.waitpid(child, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True True 0\n", done.stderr


def test_the_process_ends_with_its_caller():
    needs("math-verify")
    script = Path(grading_process.__file__)
    process = subprocess.Popen([sys.executable, script, "math-verify"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"true\n"
    process.stdin.write(json.dumps(["$3$", "3", 9.0]).encode() + b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"true\n"
    process.stdin.close()
    assert process.wait(10) == 0
    process.stdout.close()


def test_a_process_killed_from_outside_costs_no_verdict():
    needs("math-verify")
    for _ in range(3):
        assert grading_process.ask("math-verify", "$8$", "8") is True
        process = grading_process._graders["math-verify"].process
        assert not hasattr(os, "getsid") or os.getsid(process.pid) != os.getsid(0)
        process.kill()
        process.wait()


def test_the_limit_is_of_a_verdict_and_not_of_the_wait_for_the_next():
    needs("math-verify")
    assert grading_process.ask("math-verify", "$8$", "8", limit=1.0) is True
    process = grading_process._graders["math-verify"].process
    time.sleep(1.5)
    assert process.poll() is None


def test_an_interrupt_leaves_no_reply_behind(monkeypatch):
    needs("math-verify")
    assert grading_process.ask("math-verify", "$8$", "8") is True
    grader = grading_process._graders["math-verify"]

    class Interrupted:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    out, grader.process.stdout = grader.process.stdout, Interrupted()
    monkeypatch.setattr(grader, "close", lambda: setattr(grader, "process", None))
    with pytest.raises(KeyboardInterrupt):
        grading_process.ask("math-verify", "$8$", "8")
    out.close()
    assert grading_process.ask("math-verify", "$8$", "9") is False


def test_a_process_that_cannot_start_says_why(monkeypatch):
    grader = grading_process.Grader("math-verify")
    monkeypatch.setattr(sys, "executable", "/bin/false" if os.path.exists("/bin/false") else sys.executable)
    if sys.executable == "/bin/false":
        with pytest.raises(OSError, match="the process of the grader math-verify cannot start: it ended at once"):
            grader.ask("3", "3", 1.0)
    assert grader.process is None


def test_names_and_versions(monkeypatch):
    assert grader_version("exact") == "exact 1" and grader_version("first-word") == "first-word 1"
    assert grader_version(needs("math-verify")).startswith("math-verify 0.")
    for call in (grader_version, lambda kind: grade(kind, "", item("1"))):
        with pytest.raises(
            ValueError, match="unknown grader 'sympy'; known are math-verify, mathruler, exact, first-word"
        ):
            call("sympy")
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r'math-verify needs math_verify, .*; pip install "drllm-fast\[search\]"'):
        grade("math-verify", "1", item("1"))
    with pytest.raises(
        OSError, match=r"mathruler needs mathruler and pylatexenc, .*; pip install mathruler pylatexenc"
    ):
        grader_version("mathruler")
