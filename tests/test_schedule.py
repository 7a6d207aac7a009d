"""Who is worked on next, without a model."""

import itertools
import random

import numpy as np
import pytest

from drllm_fast.generation.requests import Request
from drllm_fast.generation.sampling import Sampling
from drllm_fast.generation.schedule import Schedule, joint_policy
from drllm_fast.policies import GivenPlan

NUMBERS = itertools.count()


def request(path=(1, 1, 1), tokens=1, policy=None, bound=6, capacity=10):
    made = Request(next(NUMBERS), [7] * tokens, Sampling(), policy, bound, capacity, text=None)
    made.path = tuple(path)
    return made


def with_ready(paths, *, running=(), max_batch=4, order="paths"):
    schedule = Schedule(max_batch, 100, 1000, order)
    schedule.running += [request(path) for path in running]
    schedule.ready += [request(path) for path in paths]
    return schedule


def test_the_row_that_shares_most_joins_first():
    left, right = (1, 0, 1), (0, 1, 1)
    schedule = with_ready([right, left, right, left], running=[left, left], max_batch=3)
    assert schedule.refill()
    assert [r.path for r in schedule.running] == [left, left, left]
    assert [r.path for r in schedule.ready] == [right, right, left]


def test_a_repeat_is_a_visit_of_its_own():
    twice, once = (2, 1), (1, 1)
    schedule = with_ready([once, twice], running=[twice] * 3)
    schedule.refill()
    assert schedule.running[-1].path == once  # it shares all it runs, the other one pays a share of one visit more
    schedule = with_ready([twice, once], running=[once] * 3)
    schedule.refill()
    assert schedule.running[-1].path == once


def test_equals_join_as_they_came():
    schedule = with_ready([(1, 1)] * 5, running=[(1, 1)], max_batch=3)
    first = schedule.ready[:2]
    schedule.refill()
    assert schedule.running[1:] == first


def test_by_arrival_the_first_joins_whatever_it_runs():
    schedule = with_ready([(0, 1), (1, 0)], running=[(1, 0)] * 3, order="arrival")
    first = schedule.ready[0]
    schedule.refill()
    assert schedule.running[-1] is first


def test_all_join_where_there_is_room():
    schedule = with_ready([(0, 1), (1, 0)])
    rows = list(schedule.ready)
    assert schedule.refill() and schedule.running == rows and not schedule.ready
    assert not schedule.refill()


def test_no_row_waits_for_ever():
    schedule = with_ready([(0, 1)], running=[(1, 0)] * 4)
    odd, passed = schedule.ready[0], 0
    while odd in schedule.ready:
        assert passed <= 8 * 4
        schedule.ready.append(request((1, 0)))
        schedule.remove(schedule.running[0])
        assert schedule.refill()
        passed += 1
    assert passed > 8 * 4


@pytest.mark.parametrize("batch", [4, 16])
def test_grouping_saves_blocks(batch):
    """Rows of three kinds, mixed, with answers of any length: fewer blocks run in a step than by arrival."""
    kinds = [(1, 1, 1, 0, 0, 1), (1, 0, 0, 1, 1, 1), (0, 1, 1, 1, 0, 1)]
    blocks = {}
    for order in ("arrival", "paths"):
        wild = random.Random(0)
        schedule = Schedule(batch, 64, 10**9, order)
        left = {}
        for _ in range(200):
            row = request(wild.choice(kinds))
            left[row.index] = wild.randrange(2, 30)
            schedule.waiting.append(row)
        run = steps = 0
        while len(schedule):
            if group := schedule.prompts(10**9):
                schedule.read(group)
                continue
            schedule.refill()
            run += int(np.array([r.path for r in schedule.running]).max(0).sum())
            steps += 1
            for row in list(schedule.running):
                left[row.index] -= 1
                if not left[row.index]:
                    schedule.remove(row)
        blocks[order] = run / steps
    assert blocks["paths"] < 0.9 * blocks["arrival"]


def test_prompts_of_a_forward_fit_its_tokens_and_the_pool():
    schedule = Schedule(8, 0, 10, "paths")
    rows = [request(tokens=n) for n in (4, 5, 3, 30, 1)]
    schedule.waiting.extend(rows)
    assert schedule.prompts(10**6) == rows[:2]
    assert schedule.prompts(60) == rows[:1] and schedule.prompts(59) == []
    schedule.read(rows[:3])
    assert schedule.prompts(10**6) == [rows[3]]  # longer than any forward: by itself
    assert schedule.ready == rows[:3] and len(schedule) == 5


def test_prompts_gather_while_enough_rows_decode():
    schedule = Schedule(16, 0, 1000, "paths")
    schedule.running += [request() for _ in range(13)]
    schedule.waiting.extend(request() for _ in range(9))
    assert len(schedule.prompts(10**6)) == 0  # room for three, and four are worth a forward
    schedule.running.pop()
    assert len(schedule.prompts(10**6)) == 4
    schedule.running.append(schedule.running[0])
    while len(schedule.waiting) > 2:
        schedule.waiting.pop()
    assert len(schedule.prompts(10**6)) == 2  # no more will come by waiting


def test_one_forward_has_one_policy_or_given_paths():
    mine, other = object(), object()
    schedule = Schedule(8, 0, 1000, "paths")
    rows = [request(policy=policy) for policy in (mine, mine, other)]
    schedule.waiting.extend(rows)
    assert schedule.prompts(10**6) == rows[:2] and joint_policy(rows[:2]) is mine
    given = [request(policy=GivenPlan(path)) for path in ([1, 0, 2], [0, 1, 1])]
    schedule = Schedule(8, 0, 1000, "paths")
    schedule.waiting.extend([*given, rows[0]])
    assert schedule.prompts(10**6) == given
    assert joint_policy(given).plan.tolist() == [[1, 0, 2], [0, 1, 1]]
    assert joint_policy(given[:1]) is given[0].policy


def test_who_is_not_there_is_not_removed():
    schedule = with_ready([(1, 1)])
    row = schedule.ready[0]
    assert schedule.remove(row) and not schedule.remove(row)
