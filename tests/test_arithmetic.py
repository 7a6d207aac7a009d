"""Generated arithmetic: right, distinct, graded, and the same for the same seed."""

import re

import pytest

from drllm_fast.search.arithmetic import LEVELS, arithmetic, count

SHAPES = {
    1: r"\d \+ \d",
    2: r"\d\d [+-] [1-9]",
    3: r"\d\d [+-] \d\d",
    4: r"\d+ \* \d+",
    5: r"\(\d+ \+ \d+\) \* [2-9]",
}


def test_every_question_of_every_level():
    rows = arithmetic()
    assert (
        len(rows) == sum(map(count, LEVELS)) == len({row["id"] for row in rows}) == len({r["question"] for r in rows})
    )
    for row in rows:
        question = row["question"].removesuffix(" =")
        assert re.fullmatch(SHAPES[row["level"]], question), row
        assert str(eval(question)) == row["answer"] and int(row["answer"]) >= 0
        assert row["task"] == "synth_arith" and row["choices"] is None
    numbers = [[int(n) for n in re.findall(r"\d+", row["question"])] for row in rows if row["level"] in (4, 5)]
    assert {min(n) for n in numbers} >= {2} and max(max(n) for n in numbers) == 20
    assert max(max(n) for n in numbers if len(n) == 2) == 12 and min(min(n) for n in numbers) == 2


def test_how_many_there_are():
    # Differences of two two-digit numbers that do not fall below zero: 90 * 91 / 2.
    assert [count(level) for level in LEVELS] == [100, 90 * 9 * 2, 90 * 90 + 4095, 121, 19 * 19 * 8]


def test_the_seed_decides_and_levels_take_turns():
    rows = arithmetic((1, 3), 40, seed=3)
    assert [row["level"] for row in rows] == [1, 3] * 40
    assert rows == arithmetic((1, 3), 40, seed=3)
    assert rows != arithmetic((1, 3), 40, seed=4)
    # A level's order depends on nothing but the seed.
    assert [row for row in rows if row["level"] == 3][:9] == arithmetic((3,), 9, seed=3)
    assert {row["question"][3] for row in arithmetic((2,), 60)} == {"+", "-"}
    assert arithmetic((1, 1), 2) == arithmetic((1,), 2)
    assert [row["level"] for row in arithmetic((1, 4))][-21:] == [4] * 21


def test_more_than_there_are_is_refused():
    assert len(arithmetic((4,), 121)) == 121
    for wanted in (122, 0, -1):
        with pytest.raises(ValueError, match=f"{wanted} questions of level 4 were asked for; it has 1 to 121"):
            arithmetic((4,), wanted)
    for call in (lambda: count(0), lambda: arithmetic((1, 6))):
        with pytest.raises(ValueError, match=r"unknown level \d of arithmetic; known are 1, 2, 3, 4, 5"):
            call()
