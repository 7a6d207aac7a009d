"""Budgets: the table, what a penalty does to decisions, and how budget, penalty, knob and table exclude each other."""

import json
import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drllm_fast.budget import BudgetTable
from drllm_fast.policies import PromptBatch
from drllm_fast.routers import LayerRouters
from drllm_fast.routing import set_budget

TABLE = BudgetTable((0.5, 0.9, 1.1), (3.0, 0.25, -1.0), {"prompts": 7})


def made(**changes):
    sizes = {"num_layers": 3, "hidden_size": 16, "router_size": 8}
    return LayerRouters(**(sizes | changes), generator=torch.Generator().manual_seed(0))


def batch(lengths=(3, 9, 20, 40, 1, 12, 8, 5)):
    generator = torch.Generator().manual_seed(1)
    hidden = 4 * torch.randn(sum(lengths), 16, generator=generator)
    return PromptBatch(hidden, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))


# -- the table
def test_penalties_lie_on_straight_lines():
    by_hand = {
        0.5: 3.0,
        0.6: 3 - 2.75 / 4,
        0.7: 3 - 2.75 / 2,
        0.9: 0.25,
        1.0: 0.25 - 1.25 / 2,
        1.1: -1.0,
        1.05: -0.6875,
    }
    for budget, penalty in by_hand.items():
        assert TABLE.penalty(budget) == pytest.approx(penalty)
    assert BudgetTable((0.8,), (1.5,)).penalty(0.8) == 1.5
    assert TABLE.penalty(0.5 - 1e-9) == 3.0  # rounding of what asks


@given(st.lists(st.tuples(st.floats(0.01, 2), st.floats(-9, 9)), min_size=1, max_size=8), st.data())
def test_a_larger_budget_has_no_larger_penalty(points, data):
    budgets = tuple(sorted({budget for budget, _ in points}))
    penalties = tuple(sorted((penalty for _, penalty in points), reverse=True)[: len(budgets)])
    table = BudgetTable(budgets, penalties)
    low, high = sorted(data.draw(st.floats(budgets[0], budgets[-1])) for _ in range(2))
    assert penalties[-1] - 1e-9 <= table.penalty(high) <= table.penalty(low) + 1e-9 <= penalties[0] + 2e-9


def test_round_trip_through_json():
    again = BudgetTable.from_dict(json.loads(json.dumps(TABLE.to_dict())))
    assert again == TABLE and again.source == {"prompts": 7}


@pytest.mark.parametrize("budget", [0.499, 1.101, -1, math.nan, math.inf])
def test_budgets_outside_the_table_are_refused(budget):
    with pytest.raises(ValueError, match="were calibrated for budgets from 0.5 to 1.1"):
        TABLE.penalty(budget)


@pytest.mark.parametrize("budget", ["0.9", None, True, [0.9]])
def test_a_budget_is_a_number(budget):
    with pytest.raises(TypeError, match="budget must be a number"):
        TABLE.penalty(budget)


@pytest.mark.parametrize(
    "budgets, penalties, message",
    [
        ((), (), "as many penalties as budgets"),
        ((0.5, 0.6), (1.0,), "as many penalties as budgets"),
        ((0.5, math.nan), (1.0, 0.0), "finite numbers"),
        ((0.5,), (math.inf,), "finite numbers"),
        ((0.5,), ("1",), "finite numbers"),
        ((True,), (1.0,), "finite numbers"),
        ((0.6, 0.5), (1.0, 0.0), "budgets must rise"),
        ((0.5, 0.5), (1.0, 0.0), "budgets must rise"),
        ((0.5, 0.6), (0.0, 1.0), "penalties fall"),
        ((0.0, 0.6), (1.0, 0.0), "above 0 and up to 2"),
        ((0.5, 2.1), (1.0, 0.0), "above 0 and up to 2"),
    ],
)
def test_tables_that_are_none(budgets, penalties, message):
    with pytest.raises(ValueError, match=message):
        BudgetTable(budgets, penalties)


@pytest.mark.parametrize(
    "data",
    [
        3,
        {},
        {"budgets": [0.5], "penalties": [1.0]},
        TABLE.to_dict() | {"more": 1},
        TABLE.to_dict() | {"budgets": 0.5},
        TABLE.to_dict() | {"source": "me"},
    ],
)
def test_what_is_no_written_table(data):
    with pytest.raises(ValueError, match="calibration must be None or a table"):
        made(calibration=data)


# -- decisions
@pytest.mark.parametrize("penalty, margin", [(0.0, 0.0), (0.7, 0.0), (-0.7, 0.0), (0.2, 0.5), (40.0, 0.0), (-40, 0.1)])
def test_the_cost_of_visits_decides(penalty, margin):
    routers, prompts = made(margin=margin), batch()
    routers.penalty = penalty
    seen = set()
    for layer in range(3):
        logits = routers.logits(layer, prompts).tolist()
        expected = []
        for skip, execute, repeat in logits:
            scores = [skip - margin, execute - penalty, repeat - margin - 2 * penalty]
            expected.append(scores.index(max(scores)))
        assert routers.route(layer, prompts).tolist() == expected
        seen |= set(expected)
    assert seen == {40.0: {0}, -40: {2}}.get(penalty, seen) and (abs(penalty) == 40 or len(seen) > 1)


def test_a_budget_asks_for_the_penalty_of_the_table():
    routers, by_hand, prompts = made(calibration=TABLE), made(), batch()
    plain = routers.route(1, prompts).tolist()
    for budget in (0.5, 0.7, 1.1):
        routers.budget, by_hand.penalty = budget, TABLE.penalty(budget)
        assert (routers.budget, routers.penalty) == (budget, TABLE.penalty(budget))
        assert routers.costs == by_hand.costs == (0.0, TABLE.penalty(budget), 2 * TABLE.penalty(budget))
        assert routers.route(1, prompts).tolist() == by_hand.route(1, prompts).tolist()
    routers.budget = 0.5
    assert routers.route(1, prompts).tolist() != plain
    routers.budget = None
    assert routers.penalty == 0.0 and routers.route(1, prompts).tolist() == plain


def test_a_penalty_set_by_hand_comes_back_after_a_budget():
    routers = made(calibration=TABLE)
    routers.penalty = 0.4
    routers.budget = 0.9
    assert routers.penalty == 0.25
    routers.budget = None
    assert routers.penalty == 0.4
    routers.budget = 0.5
    routers.calibration = None
    assert (routers.budget, routers.penalty) == (None, 0.4)


def test_a_new_table_is_followed_at_once():
    routers = made(calibration=TABLE)
    routers.budget = 0.9
    routers.calibration = {"budgets": [0.8, 1.0], "penalties": [2.0, 1.0], "source": {}}
    assert (routers.budget, routers.penalty) == (0.9, 1.5)
    before = routers.calibration
    with pytest.raises(ValueError, match="budget 0.9: these routers were calibrated for budgets from 0.3 to 0.4"):
        routers.calibration = BudgetTable((0.3, 0.4), (2.0, 1.0))
    assert routers.calibration is before and (routers.budget, routers.penalty) == (0.9, 1.5)
    routers.calibration = TABLE
    assert routers.penalty == 0.25


def test_what_excludes_a_budget():
    with pytest.raises(ValueError, match="have no table of budgets; make one with drllm-fast calibrate"):
        made().budget = 0.9
    routers = made(calibration=TABLE, knob=-0.6)
    with pytest.raises(ValueError, match="budget 0.9 and knob -0.6 exclude each other"):
        routers.budget = 0.9
    assert routers.budget is None
    routers.knob = -0.5
    routers.budget = 0.9
    with pytest.raises(ValueError, match="knob -0.6 and budget 0.9 exclude each other"):
        routers.knob = -0.6
    with pytest.raises(ValueError, match="penalty 2.0 and budget 0.9 exclude each other"):
        routers.penalty = 2.0
    with pytest.raises(ValueError, match="from 0.5 to 1.1"):
        routers.budget = 2
    assert (routers.knob, routers.budget, routers.penalty) == (-0.5, 0.9, 0.25)
    with pytest.raises(ValueError, match="keeps no budget"):
        set_budget(object(), 0.9)


@pytest.mark.parametrize("name", ["penalty", "margin"])
@pytest.mark.parametrize(
    "value, error",
    [("1", TypeError), (None, TypeError), (True, TypeError), (math.nan, ValueError), (math.inf, ValueError)],
)
def test_costs_are_numbers(name, value, error):
    routers = made()
    with pytest.raises(error, match=f"{name} must be a"):
        setattr(routers, name, value)
    assert routers.costs == (0, 0, 0)


def test_a_margin_is_never_negative():
    with pytest.raises(ValueError, match="margin must be a number of 0 or more, got -0.1"):
        made(margin=-0.1)


def test_the_budget_of_a_routed_model(model, row):
    routers = LayerRouters.for_model(model, router_size=8, generator=torch.Generator().manual_seed(0))
    routers.calibration = BudgetTable((0.1, 1.9), (1000.0, -1000.0))
    model.enable_dynamic_routing(routers, budget=0.1)
    shares = []
    with torch.no_grad():
        for budget in (None, 1.9):
            shares += [model(row.unsqueeze(0)) and model.routing.stats.share]
            model.routing.budget = budget
        model(row.unsqueeze(0))
    assert shares[0] == 0 and 0 < shares[1] < 2 and model.routing.stats.share == 2


def test_threads_with_costs_of_their_own():
    """Routers that share weights, each with its penalty, in threads at once; and one of them under two budgets."""
    prompts, routers = batch(), made(calibration=TABLE)
    expected = {}
    for budget in (0.5, 1.1):
        routers.budget = budget
        expected[budget] = routers.route(1, prompts).tolist()
    assert expected[0.5] != expected[1.1]
    wrong = []

    def turn(budget):
        for _ in range(200):
            routers.budget = budget
            found = routers.route(1, prompts).tolist()
            if found not in expected.values():
                wrong.append(found)

    threads = [threading.Thread(target=turn, args=(budget,)) for budget in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
