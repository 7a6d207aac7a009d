"""Figures from made-up outcomes, worked out by hand, and the report made of them."""

import base64
import json
import math
import re
import sys

import numpy as np
import pytest

from drllm_fast.evaluation import Contender, EvaluationReport
from drllm_fast.evaluation.figures import figures_of
from drllm_fast.evaluation.intervals import mcnemar, paired_difference
from drllm_fast.evaluation.outcomes import Outcome
from drllm_fast.search.unit import Item

L = 4
DENSE, ONE, TWO, MORE = (1, 1, 1, 1), (1, 1, 0, 1), (1, 0, 0, 1), (1, 2, 1, 1)
SECRET = "a secret <prompt>"
ABOUT = {"model": "tiny <one>", "dtype": "float32", "layers": L, "graders": {"sums": "exact 1"}}


def item(number, task="quiz"):
    return Item(f"{task}{number}", task, SECRET, (" yes", " no" + SECRET), 0)


def hit(right):
    return Outcome(scores=(-1.0, -2.0) if right else (-2.0, -1.0))


def quiz(task="quiz", flip=False):
    """Ten items: right are dense 8, ONE 6, TWO 4, MORE 9; the routers mix."""
    rights = {DENSE: 8, ONE: 6, TWO: 4, MORE: 9}
    items = [item(i, task) for i in range(10)]
    outcomes = [{path: hit((i < right) != flip) for path, right in rights.items()} for i in range(10)]
    return items, outcomes


def constant(kind, name, budget, path, n=10):
    return Contender(kind, name, budget, (path,) * n)


def competing(n=10):
    mixed = tuple(MORE if i % 2 else TWO for i in range(n))  # 5 and 2 visits
    return [
        constant("dense", "dense", None, DENSE, n),
        Contender("routers", "routers", 0.9, mixed),
        constant("static", "cka", 0.9, TWO, n),
        constant("static", "block-influence", 0.9, ONE, n),
        constant("random", "random", 0.9, ONE, n),
        constant("random", "random", 0.9, TWO, n),
    ]


def figures(items, outcomes, compete=None, tokens=None, **options):
    values = {"oracle": True, "about": ABOUT, "samples": 500} | options
    return figures_of(items, compete or competing(len(items)), outcomes, tokens=tokens or [None] * len(items), **values)


def rows(task):
    return {(row["kind"], row["name"]): row for row in task["rows"]}


def test_accuracies_by_hand():
    [task] = figures(*quiz())["tasks"]
    found = rows(task)
    value = {name: row["value"] for name, row in found.items()}
    # Routers: even items on TWO (right 0, 2), odd ones on MORE (right 1, 3, 5, 7).
    assert value == {
        ("dense", "dense"): 0.8, ("routers", "routers"): 0.6, ("static", "cka"): 0.4,
        ("static", "block-influence"): 0.6, ("random", "random"): 0.5, ("oracle", "oracle"): 0.8,
    }  # fmt: skip
    assert task["n"] == 10 and task["measure"] == "accuracy" and task["tokens"] is None
    routers, random = found["routers", "routers"], found["random", "random"]
    assert (routers["visits"], routers["share"], routers["masks"]) == (3.5, 0.875, 1)
    assert (random["visits"], random["masks"], random["versus_dense"]["mcnemar"]) == (2.5, 2, None)
    assert routers["kept"] == pytest.approx(0.75)
    # The oracle may use ONE, TWO and the dense path (0.9 of 4 visits, rounded up), not MORE: items 0-3 are right on
    # TWO, 4-5 on ONE, 6-7 on the dense path, and 8-9 are wrong on all, TWO being the shortest.
    assert found["oracle", "oracle"]["visits"] == (4 * 2 + 2 * 3 + 2 * 4 + 2 * 2) / 10
    order = [(row["kind"], row["budget"]) for row in task["rows"]]
    assert order[0] == ("dense", None) and order[-1] == ("oracle", 0.9)


def test_differences_are_paired():
    items, outcomes = quiz()
    [task] = figures(items, outcomes, seed=5, samples=4000)["tasks"]
    routers = rows(task)["routers", "routers"]
    dense = [i < 8 for i in range(10)]
    own = [i < (9 if i % 2 else 4) for i in range(10)]
    static = [i < 6 for i in range(10)]
    for name, other in (("versus_dense", dense), ("versus_static", static)):
        expected, found = paired_difference(own, other, samples=4000, seed=1), routers[name]
        assert found["mean"] == pytest.approx(expected.mean) and found["mcnemar"] == mcnemar(own, other)
        assert found["low"] == pytest.approx(expected.low, abs=0.1)
        assert found["high"] == pytest.approx(expected.high, abs=0.1)
        assert found["p"] == pytest.approx(expected.p, abs=0.05)
    assert routers["versus_static"]["name"] == "block-influence"  # the better one
    assert rows(task)["static", "cka"]["versus_static"] is None


def test_perplexity_by_hand():
    items = [Item(f"t{i}", "text", SECRET, (" text",), 0) for i in range(3)]
    tokens, nats = [10, 5, 1], {DENSE: (20.0, 15.0, 2.0), ONE: (24.0, 20.0, 5.0), TWO: (40.0, 8.0, 9.0)}
    outcomes = [{path: Outcome(scores=(-values[i],)) for path, values in nats.items()} for i in range(3)]
    compete = [
        constant("dense", "dense", None, DENSE, 3),
        Contender("routers", "routers", 0.5, (ONE, TWO, ONE)),
        constant("static", "cka", 0.5, ONE, 3),
        constant("static", "block-influence", 0.5, TWO, 3),
        constant("random", "random", 1.0, DENSE, 3),
    ]
    [task] = figures(items, outcomes, compete, tokens)["tasks"]
    found = rows(task)
    assert (task["measure"], task["tokens"]) == ("perplexity", 16)
    assert found["dense", "dense"]["value"] == pytest.approx(math.exp(37 / 16))
    routers = found["routers", "routers"]
    assert routers["value"] == pytest.approx(math.exp((24 + 8 + 5) / 16))
    assert routers["kept"] == pytest.approx(1) and routers["versus_dense"]["mean"] == pytest.approx(0)
    assert routers["versus_static"]["name"] == "cka"  # 49 nats, the other one 57
    assert routers["versus_static"]["mean"] == pytest.approx(-12 / 16)
    assert routers["versus_static"]["mcnemar"] is None and routers["normalised"] is None
    assert routers["low"] < routers["value"] < routers["high"]
    assert found["oracle", "oracle"]["value"] == pytest.approx(math.exp((40 + 8 + 9) / 16))  # TWO alone has 2 visits
    [oracle] = [row for row in task["rows"] if (row["kind"], row["budget"]) == ("oracle", 1.0)]
    assert oracle["value"] == pytest.approx(math.exp((20 + 8 + 2) / 16)) and oracle["visits"] == (4 + 2 + 4) / 3
    outcomes[0][TWO] = Outcome(scores=(-math.inf,))
    with pytest.raises(ValueError, match="item t0 of text"):
        figures(items, outcomes, compete, tokens)


def test_means_over_tasks_count_tasks_alike():
    items, outcomes = quiz()
    more, others = quiz("other", flip=True)
    [average] = figures(items + more[:2], outcomes + others[:2], competing(12))["averages"]
    found = {(row["kind"], row["name"]): row for row in average["rows"]}
    # In the other task items 0 and 1 are wrong on all paths.
    assert average["tasks"] == ["quiz", "other"] and found["dense", "dense"]["value"] == pytest.approx(0.4)
    routers = found["routers", "routers"]
    assert routers["versus_dense"]["mean"] == pytest.approx((0.6 - 0.8) / 2)
    assert routers["versus_static"]["mean"] == pytest.approx(0)
    [task, _] = figures(items + more[:2], outcomes + others[:2], competing(12))["tasks"]
    alone = rows(task)["routers", "routers"]["versus_dense"]
    assert routers["versus_dense"]["low"] == pytest.approx(alone["low"] / 2)  # of the other one nothing varies


def test_measures_of_one_task_are_kept_apart():
    items, outcomes = quiz()
    text = Item("t", "quiz", SECRET, (" text",), 0)
    told = {path: Outcome(scores=(-3.0,)) for path in outcomes[0]}
    found = figures([*items, text], [*outcomes, told], tokens=[None] * 10 + [2])
    assert [(task["measure"], task["n"]) for task in found["tasks"]] == [("accuracy", 10), ("perplexity", 1)]
    assert len(found["averages"]) == 2


def test_scores_that_are_not_finite_are_wrong():
    items, outcomes = quiz()
    outcomes[0][DENSE] = Outcome(scores=(math.nan, -1.0))
    assert rows(figures(items, outcomes)["tasks"][0])["dense", "dense"]["value"] == 0.7


# -- the report
@pytest.fixture
def report():
    items, outcomes = quiz()
    texts = [Item(f"t{i}", "text", SECRET, (SECRET,), 0) for i in range(3)]
    told = [{path: Outcome(scores=(-30.0 / sum(path) - i,)) for path in outcomes[0]} for i in range(3)]
    more, others = quiz("other")
    values = figures(items + more + texts, outcomes + others + told, competing(23), [None] * 20 + [9, 8, 7])
    return EvaluationReport(values)


def test_files(report, tmp_path):
    pytest.importorskip("matplotlib")
    files = report.write(tmp_path)
    assert {file.name for file in files} == {"report.json", "report.md", "report.png", "report.html"}
    assert EvaluationReport.read(tmp_path / "report.json") == report
    png = (tmp_path / "report.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    page = (tmp_path / "report.html").read_text()
    assert base64.b64decode(re.search(r"base64,([^\"]+)", page).group(1)) == png
    assert page == report.html()
    for file in ("report.json", "report.md", "report.html"):
        assert "secret" not in (tmp_path / file).read_text()
    outside = set(re.findall(r"(?:src|href)=\"([^\"]{0,12})", page)) - {"data:image/p"}
    assert not outside and "<script" not in page and "prefers-color-scheme: dark" in page
    assert "tiny &lt;one&gt;" in page and "<one>" not in page


def test_tables_say_what_the_figures_are(report):
    text, page, markdown = report.text(), report.html(), report.markdown()
    for words in ("3 items of 24 tokens", "QUIZ: ACCURACY", "TEXT: PERPLEXITY", "MEAN OF 2 TASKS"):
        assert words in text
    for said in (" ".join(text.split()), page, markdown):
        assert "looking at the answer" in said and "block-influence" in said and "random, mean of 2" in said
    quiz = text[text.index("QUIZ: ACCURACY") : text.index("QUIZ: AGAINST")]
    [line] = [line for line in quiz.splitlines() if line.strip().startswith("routers")]
    assert line.split()[:7] == ["routers", "0.9", "3.50", "87.5", "%", "60.0", "%"]
    differences = text[text.index("QUIZ: AGAINST") : text.index("OTHER: ACC")]
    dense, static = [line for line in differences.splitlines() if "0.9    3.50" in line]
    assert dense.startswith(" routers") and "-20.0" in dense
    assert static.split()[:5] == ["block-influence", "0.9", "3.50", "3.00", "+0.0"]
    assert markdown.count("| routers | 0.9 |") == 7  # two tables for each of three tasks, and the mean
    for row in re.findall(r"<tr>.*?</tr>", page):
        assert row.count("<td>") in (0, 2) or row.count("<td>") >= 7


def test_the_picture_shows_the_figures(report):
    pytest.importorskip("matplotlib")
    panels = [axes for axes in report.plot().axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == ["quiz (n = 10)", "other (n = 10)", "text (n = 3)"]
    curves = {line.get_label(): line.get_xydata().tolist() for line in panels[0].lines}
    assert curves["routers"] == [[87.5, pytest.approx(60)]] and curves["static: cka"] == [[50, pytest.approx(40)]]
    assert np.allclose(panels[0].lines[0].get_ydata(), 80)
    assert "oracle (looks at the answer)" in curves and "perplexity" in panels[2].get_ylabel()
    with pytest.raises(ValueError, match="format"):
        report.plot("report.bmp")


def test_without_matplotlib_the_tables_are_there(report, tmp_path, monkeypatch):
    (tmp_path / "report.png").write_bytes(b"of an earlier report")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert {file.name for file in report.write(tmp_path)} == {"report.json", "report.md", "report.html"}
    assert not (tmp_path / "report.png").exists() and "<img" not in report.html()
    with pytest.raises(ImportError, match=r"drllm-fast\[plot\]"):
        report.plot()
    assert json.loads((tmp_path / "report.json").read_text())["layers"] == L
