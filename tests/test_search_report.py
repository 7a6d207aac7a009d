"""The honesty report: every figure against one worked out by hand, and what it says of luck on simulated searches."""

import copy
import csv
import gzip
import json
import math
import random
import sys

import pytest

from drllm_fast.search.figures import Mean, Ratio, wilson
from drllm_fast.search.manifest import Manifest
from drllm_fast.search.paths import dense_path, edits, encode
from drllm_fast.search.report import SearchReport
from drllm_fast.search.report_paths import COLUMNS, write_paths
from drllm_fast.search.static_edits import StaticEdits, edit_name, half_of
from drllm_fast.search.store import open_store, read_store
from drllm_fast.search.unit import SearchConfig, UnitKey, UnitResult

DENSE = "1111"
PROMPT = "the very prompt"


def unit(item, right, *, paths=(), best=DENSE, kept=None, task="t", choices=True, **values):
    """A unit on 4 blocks with the answer 2 of four; `right` says of the dense path and each of `paths` whether it is
    right."""
    tried = [DENSE, *paths]
    assert len(right) == len(tried)
    saved = best.count("0") - best.count("2")
    defaults = {
        "key": UnitKey(task, item, "hash", "model", "config", 0),
        "prompt": PROMPT,
        "choices": [f" {PROMPT}"] * 4 if choices else None,
        "answer": "2",
        "level": None,
        "paths": tried,
        "rewards": [float(hit) for hit in right],
        "correct": [bool(hit) for hit in right],
        "predictions": ["2" if hit else "1" for hit in right],
        "scores": None,
        "best": best,
        "kept": best != DENSE and (not right[0] or saved > 0) if kept is None else kept,
        "control_target": None,
        "control_reached": None,
        "probes": [],
        "probes_correct": [],
        "forwards": len(tried),
        "visits": 10,
        "visits_alone": 15,
        "grader": "choice",
        "seconds": 0.5,
    }
    return UnitResult(**defaults | values)


def figures(*units, **values):
    return SearchReport.of(units, **values).to_dict()


def manifest(reward="exact"):
    config = SearchConfig(reward=reward)
    return Manifest.of(model="tiny", fingerprint={}, config=config, task="t", seed=0)


def under(manifest, result):
    """The result as one of the manifest's search."""
    key = result.key
    result.key = UnitKey(key.task, key.item, key.prompt, manifest.model_hash, manifest.config_hash, manifest.seed)
    return result


FOUR = [
    unit("a", [1, 1, 0], paths=["0111", "1011"], best="0111", level=1),  # preserved, and broken by one path
    unit("b", [0, 0, 1], paths=["0111", "1112"], best="1112", control_target="3", control_reached=True, level=1),
    unit("c", [0, 0], paths=["0011"], control_target="0", control_reached=False, level=2),
    unit("d", [0, 1], paths=["1001"], best="1001", control_target="0", control_reached=False, level=2, forwards=9),
]


def test_shares_of_accuracy_and_repair():
    f = figures(*FOUR)
    assert [f["accuracy"][name]["share"] for name in ("dense", "oracle", "best", "kept")] == [0.25, 0.75, 0.75, 0.75]
    assert (f["repair"]["found"]["count"], f["repair"]["found"]["n"]) == (2, 3)
    assert (f["repair"]["repaired"]["count"], f["repair"]["repaired"]["n"]) == (2, 3)


def test_the_control_is_paired():
    control = figures(*FOUR)["repair"]["control"]
    assert (control["repaired"]["count"], control["reached"]["count"], control["reached"]["n"]) == (2, 1, 3)
    assert (control["only_repaired"], control["only_reached"]) == (1, 0)
    assert control["difference"]["mean"] == pytest.approx(1 / 3)  # 0, 0, 1
    assert control["difference"]["se"] == pytest.approx(1 / 3)  # sqrt(1/3 / 3)


def test_units_without_a_control_are_not_compared():
    without = unit("e", [0, 1], paths=["0111"], best="0111")
    only = unit("f", [0, 0], paths=["0111"], control_target="0", control_reached=True)
    f = figures(without, only)["repair"]
    assert (f["repaired"]["count"], f["repaired"]["n"]) == (1, 2)
    assert (f["control"]["repaired"]["count"], f["control"]["repaired"]["n"]) == (0, 1)
    assert f["control"]["only_reached"] == 1 and f["control"]["difference"] == {"n": 1, "mean": -1.0, "se": None}


def test_breaks_are_of_right_answers_and_the_dense_path_is_not_tried():
    safe = unit("s", [1, 1], paths=["0111"], probes=["0111", "1012", "1110"], probes_correct=[True, False, False])
    f = figures(*FOUR, safe, unit("n", [1]))["breaks"]
    assert (f["units"]["count"], f["units"]["n"]) == (1, 3)
    assert f["tried"]["mean"] == 1.0  # 2, 1, 0
    assert (f["tried_break"]["count"], f["tried_break"]["of"], f["tried_break"]["n"]) == (1, 3, 2)
    assert (f["probes_break"]["count"], f["probes_break"]["of"]) == (2, 3)


def test_random_edits_that_repair():
    wrong = unit("w", [0], probes=["0111", "1011", "1101", "1110"], probes_correct=[True, False, False, False])
    assert figures(wrong)["breaks"]["probes_repair"]["share"] == 0.25
    assert figures(wrong)["breaks"]["probes_break"]["share"] is None


def test_layers_saved():
    saved = figures(*FOUR)["saved"]
    assert saved["kept"] == pytest.approx({"n": 3, "mean": 2 / 3, "se": math.sqrt((14 / 3) / 2 / 3)})  # 1, -1, 2
    assert saved["preserved"]["mean"] == 1.0 and saved["repaired"]["mean"] == 0.5
    assert saved["all"]["mean"] == 0.5 and saved["all"]["n"] == 4
    assert saved["share_all"] == 0.125 and saved["share_kept"] == pytest.approx(1 / 6)


def test_a_best_path_that_is_not_kept_saves_nothing():
    longer = unit("l", [1, 1], paths=["2111"], best="2111")
    assert not longer.kept
    assert figures(longer)["saved"]["all"]["mean"] == 0 and figures(longer)["paths"]["kept"] == 0


def test_cost():
    cost = figures(*FOUR)["cost"]
    assert cost["forwards"] == 3 + 3 + 2 + 9
    assert cost["forwards_per_unit"] == 17 / 4 and cost["forwards_per_kept"] == 17 / 3
    assert (cost["visits"], cost["visits_alone"], cost["ratio"], cost["seconds"]) == (40, 60, 1.5, 2.0)


def test_paths_of_kept_units():
    again = unit("z", [1, 1], paths=["0111"], best="0111")
    paths = figures(*FOUR, again)["paths"]
    assert (paths["kept"], paths["distinct"]) == (4, 3)
    assert paths["skipped"] == [2, 1, 1, 0] and paths["repeated"] == [0, 0, 0, 1]
    assert paths["visits"] == {"2": 1, "3": 2, "5": 1}
    assert paths["common"][0] == {"edit": "skip 0", "path": "0111", "units": 2}


def test_levels_and_tasks():
    other = unit("a", [1], task="other", choices=False, grader="exact 1")
    f = figures(*FOUR, other)
    assert [(g["task"], g["level"], g["dense"]["share"], g["repaired"]["n"]) for g in f["levels"]] == [
        ("t", 1, 0.5, 1),
        ("t", 2, 0.0, 2),
    ]
    assert [(g["task"], g["kept"]["n"], g["dense"]["share"]) for g in f["tasks"]] == [("other", 1, 1.0), ("t", 4, 0.25)]
    assert f["search"]["graders"] == {"choice": 4, "exact 1": 1} and f["search"]["tasks"] == {"other": 1, "t": 4}
    text = SearchReport(f).text()
    assert "t, level 2" in text and "other" in text
    assert "BY TASK" not in SearchReport.of([unit("a", [1])]).text()


def test_agreement_counts_as_found_and_not_as_repaired():
    one_lucky_path = unit("a", [0, 1], paths=["0111"], best=DENSE, control_target="0", control_reached=False)
    f = figures(one_lucky_path)
    assert f["accuracy"]["oracle"]["count"] == 1 and f["accuracy"]["best"]["count"] == 0
    assert f["repair"]["found"]["count"] == 1 and f["repair"]["repaired"]["count"] == 0
    control = f["repair"]["control"]  # by the measure that the control has to reach
    assert control["repaired"]["count"] == 0 and control["difference"]["mean"] == 0


def kl_unit(item, predictions, choices=True):
    same = [prediction == predictions[0] for prediction in predictions]
    result = unit(item, same, paths=["0111", "1011"][: len(same) - 1], best="0111", choices=choices)
    result.predictions = predictions
    result.probes, result.probes_correct = ["0111"], [same[1]]
    return under(manifest("kl"), result)


def test_without_labels_choices_are_graded_all_the_same():
    m = manifest("kl")
    wrong, right = kl_unit("a", ["1", "1", "2"]), kl_unit("b", ["2", "2", "0"])
    assert wrong.correct[0]
    f = figures(wrong, right, manifest=m)
    assert f["search"]["label_free"] and f["static"]["measure"] == "agreement"
    assert f["accuracy"]["dense"]["share"] == 0.5 and f["accuracy"]["oracle"]["share"] == 1.0
    assert f["accuracy"]["best"]["share"] == 0.5 and f["saved"]["preserved"]["n"] == 2
    assert f["breaks"]["units"]["share"] == 1.0 and f["breaks"]["probes_repair"]["n"] == 0
    assert "sees no label" in SearchReport(f).text().replace("\n", " ")


def test_without_labels_free_answers_are_not_known():
    f = figures(kl_unit("a", ["x", "x", "y"], choices=False), manifest=manifest("kl"))
    assert f["accuracy"]["dense"] == {"count": 0, "n": 0, "share": None, "low": None, "high": None}
    assert f["accuracy"]["kept"]["share"] == 1.0 and f["breaks"]["units"]["n"] == 0
    assert "it is not known which are right" in SearchReport(f).text().replace("\n", " ")


def test_the_manifest_says_what_was_searched():
    m = manifest("agreement")
    f = figures(under(m, unit("a", [1])), manifest=m)
    search = f["search"]
    assert (search["model"], search["method"], search["reward"], search["simulations"]) == (
        "tiny", "mcts", "agreement", 50,
    )  # fmt: skip
    assert "agreement of 3 paths" in SearchReport(f).text()


def test_units_of_another_search_are_refused():
    with pytest.raises(ValueError, match="configuration|model"):
        figures(unit("a", [1]), manifest=manifest())
    other = unit("b", [1])
    other.key = UnitKey("t", "b", "hash", "model", "another", 0)
    with pytest.raises(ValueError, match="one search"):
        figures(unit("a", [1]), other)
    longer = unit("c", [1])
    longer.paths, longer.best = ["11111"], "11111"
    with pytest.raises(ValueError, match="one search"):
        figures(unit("a", [1]), longer)


def test_scores_that_are_not_finite_are_counted():
    f = figures(
        unit("a", [1], scores=[[math.nan, -1.0]], seconds=math.nan),
        unit("b", [1], scores=[[-math.inf, -1.0]]),
        unit("c", [1], scores=[[-2.0, -1.0]]),
    )
    assert f["accuracy"]["not_finite"] == 2 and f["cost"]["seconds"] == 1.0
    json.dumps(f, allow_nan=False)
    assert "Warning: units with a score that is no finite number: 2" in SearchReport(f).text().replace("\n", " ")


EDGES = {
    "no units": [],
    "one right": [unit("a", [1])],
    "one wrong": [unit("a", [0])],
    "all right": [unit(str(i), [1, 1], paths=["0111"], best="0111") for i in range(5)],
    "all wrong": [unit(str(i), [0, 0], paths=["0111"]) for i in range(5)],
    "free answers": [unit("a", [1, 0], paths=["0111"], choices=False, control_target=None)],
    "tasks alike in name": [unit("a", [1], task="a|b\n[/x]"), unit("a", [0], task="[bold]", level=3)],
}


@pytest.mark.parametrize("name", EDGES)
def test_edge_cases_are_written_and_read_back(name, tmp_path):
    pytest.importorskip("matplotlib")
    report = SearchReport.of(EDGES[name])
    text = report.text(80)
    assert max(map(len, text.splitlines())) <= 80
    assert "not enough probes" in text and PROMPT not in text
    files = report.write(tmp_path)
    assert [file.name for file in files] == ["report.json", "report.md", "report.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "report.md", "report.png"]
    assert SearchReport.read(files[0]) == report and SearchReport.read(files[0]).markdown() == report.markdown()
    assert PROMPT not in files[0].read_text() + files[1].read_text()
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_nothing_is_not_zero():
    f = figures()
    assert f["accuracy"]["dense"]["share"] is None and f["saved"]["all"]["mean"] is None
    assert f["cost"]["ratio"] is None and f["cost"]["forwards_per_kept"] is None
    assert figures(unit("a", [0]))["cost"]["forwards_per_kept"] is None


def test_markdown_tables_are_whole():
    report = SearchReport.of([unit("a", [1], task="a|b"), unit("b", [1], task="c")])
    table = [line.replace("\\|", "") for line in report.markdown().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} <= {3, 4, 5, 6, 7}
    assert any(line.startswith("| ab | 100.0 % |") for line in table)


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    report = SearchReport.of(FOUR)
    assert [file.name for file in report.write(tmp_path)] == ["report.json", "report.md"]
    assert "report.png" not in (tmp_path / "report.md").read_text()
    with pytest.raises(ImportError, match="plot"):
        report.plot()


def test_read_refuses_another_file(tmp_path):
    (tmp_path / "x.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="no report"):
        SearchReport.read(tmp_path / "x.json")


def test_plot_refuses_another_ending(tmp_path):
    with pytest.raises(ValueError, match="format"):
        SearchReport.of(FOUR).plot(tmp_path / "x.txt")


def test_wilson():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 0) == (None, None)


def test_mean_and_ratio():
    mean = Mean()
    for value in (1, 2, 6):
        mean.add(value)
    assert mean.to_dict() == pytest.approx({"n": 3, "mean": 3.0, "se": math.sqrt(7 / 3)})
    ratio = Ratio()
    for hits, of in ((1, 2), (0, 0), (3, 4)):
        ratio.add(hits, of)
    # r = 4/6; residuals 1 - 4/3 and 3 - 8/3, both 1/3 in size; sqrt(2 * 2/9) / 6
    assert ratio.to_dict() == pytest.approx({"count": 4, "of": 6, "n": 2, "share": 2 / 3, "se": 1 / 9})


@pytest.mark.parametrize(
    ("path", "name"),
    [("1111", "dense"), ("1011", "skip 1"), ("1001", "skip 1-2"), ("1112", "repeat 3"), ("0102", "skip 0 2, repeat 3")],
)
def test_edit_names(path, name):
    assert edit_name(path) == name


def items(half, count):
    found = (f"item {number}" for number in range(10_000))
    return [item for item in found if half_of(item) == half][:count]


def static(*observations):
    edits = StaticEdits()
    for half, path, gains in observations:
        for item, gain in zip(items(half, len(gains)), gains, strict=True):
            edits.add(item, gain < 0, [path], [gain > 0])
    return edits.to_dict()


def test_the_static_edit_is_measured_where_it_was_not_chosen():
    f = static(
        (0, "0111", [1] * 6 + [0] * 6),  # best on half 0, +0.5; on half 1 it is worth 0.25
        (1, "0111", [1] * 3 + [0] * 9),
        (0, "1112", [-1] * 3 + [0] * 9),
        (1, "1112", [1] * 9 + [0] * 3),  # best on half 1, +0.75; on half 0 it costs 0.25
    )
    best = f["best"]
    assert [(way["edit"], way["saved"]) for way in best["ways"]] == [("skip 0", 1), ("repeat 3", -1)]
    assert best["gain"] == pytest.approx((0.25 - 0.25) / 2) and best["selection_gain"] == 0.625 and best["n"] == 24
    one = math.sqrt((3 - 9 / 12) / 11 / 12)
    assert best["se"] == pytest.approx(math.hypot(one, one) / 2)
    saving = f["best_saving"]  # the only edit that saves
    assert saving["gain"] == pytest.approx((0.25 + 0.5) / 2) and saving["selection_gain"] == pytest.approx(0.375)
    assert [edit["path"] for edit in f["edits"]] == ["0111", "1112"] and f["edits"][0]["mean"] == 9 / 24


@pytest.mark.parametrize("seen", [(9, 30), (30, 9)])
def test_an_edit_needs_enough_probes_in_both_halves(seen):
    f = static((0, "0111", [1] * seen[0]), (1, "0111", [1] * seen[1]))
    assert f["best"] is None and f["best_saving"] is None and f["least"] == 10
    assert f["edits"][0]["n"] == 39
    assert static((0, "0111", [1] * 10), (1, "0111", [0] * 10))["best"]["gain"] == 0.5


def test_rare_edits_do_not_win_by_luck():
    common = [[0] * 200] * 2
    f = static((0, "0111", common[0]), (1, "0111", common[1]), (0, "1112", [1] * 12), (1, "1112", [1] * 12))
    assert f["least"] == 53 and f["best"]["ways"][0]["edit"] == "skip 0"  # 424 / 2 edits / 2 halves / 2


def test_where_only_repeats_were_seen_no_edit_saves():
    f = static((0, "1112", [1] * 20), (1, "1112", [1] * 20))
    assert f["best"]["gain"] == 1.0 and f["best_saving"] is None


def population(seed, units, helps=None, layers=12, probes=6):
    """Results whose edits leave 85 % of the right answers right and repair 18.3 % of the wrong ones, so that with 55 %
    right none of them changes the accuracy; all but `helps`, which leaves and repairs more."""
    rng = random.Random(seed)
    singles = edits(dense_path(layers))
    for number in range(units):
        right = rng.random() < 0.55
        drawn = rng.sample(singles, probes)
        hits = []
        for path in drawn:
            stays, repairs = (0.95, 0.4) if encode(path) == helps else (0.85, 0.15 * 0.55 / 0.45)
            hits.append(rng.random() < (stays if right else repairs))
        yield unit(
            f"item {number}",
            [right],
            key=UnitKey("t", f"item {number}", "hash", "model", "config", 0),
            paths=[],
            probes=[encode(path) for path in drawn],
            probes_correct=hits,
        )


def twelve(results):
    for result in results:
        result.paths, result.best = ["1" * 12], "1" * 12
        result.kept = False
        yield result


def test_a_static_edit_that_helps_is_found():
    helps = "1" * 5 + "0" + "1" * 6
    best = figures(*twelve(population(1, 3000, helps)))["static"]["best"]
    assert [way["edit"] for way in best["ways"]] == ["skip 5", "skip 5"]
    true = 0.45 * 0.4 - 0.55 * 0.05  # 0.1525
    assert abs(best["gain"] - true) < 3 * best["se"] and best["gain"] > 3 * best["se"]


def test_where_no_edit_helps_the_held_out_gain_is_nothing():
    gains, chosen, errors = [], [], []
    for seed in range(20):
        best = figures(*twelve(population(seed, 800)))["static"]["best"]
        gains.append(best["gain"])
        chosen.append(best["selection_gain"])
        errors.append(best["se"])
    mean, spread = sum(gains) / 20, sum(errors) / 20
    assert abs(mean) < 3 * spread / math.sqrt(20)
    assert min(chosen) > 0 and sum(chosen) / 20 > 2 * spread  # what the luck of the choice seems to gain
    # The standard error is about the spread that is seen.
    assert 0.5 < math.sqrt(sum((gain - mean) ** 2 for gain in gains) / 19) / spread < 1.6


def test_halves_are_by_item_and_about_alike():
    assert half_of("Mercury_7175875") == half_of("Mercury_7175875")
    assert 450 < sum(half_of(f"item {number}") for number in range(1000)) < 550


def test_paths_without_text(tmp_path):
    file = tmp_path / "paths.csv.gz"
    assert write_paths(file, FOUR) == 4
    first = file.read_bytes()
    assert first[4:8] == bytes(4)  # no time, so that the same results make the same file
    rows = list(csv.DictReader(gzip.open(file, "rt", newline="")))
    assert list(rows[0]) == list(COLUMNS)
    assert rows[0] == {
        "task": "t", "item": "a", "seed": "0", "level": "1", "dense_correct": "1", "kept": "1", "best": "0111",
        "visits": "3", "control_reached": "",
    }  # fmt: skip
    assert [row["control_reached"] for row in rows] == ["", "1", "0", "0"]
    assert PROMPT not in gzip.decompress(first).decode()
    write_paths(file, FOUR)
    assert file.read_bytes() == first


def test_paths_as_plain_csv_and_parquet(tmp_path):
    assert write_paths(tmp_path / "paths.csv", FOUR) == 4
    assert (tmp_path / "paths.csv").read_text().count("\n") == 5
    parquet = pytest.importorskip("pyarrow.parquet")
    assert write_paths(tmp_path / "paths.parquet", [*FOUR, unit("e", [1])]) == 5
    rows = parquet.read_table(tmp_path / "paths.parquet").to_pylist()
    assert rows[1]["dense_correct"] is False and rows[1]["best"] == "1112" and rows[4]["level"] is None


def test_paths_that_are_not_known_or_not_writable(tmp_path):
    free = kl_unit("a", ["x", "x", "y"], choices=False)
    write_paths(tmp_path / "paths.csv", [free], label_free=True)
    assert next(csv.DictReader(open(tmp_path / "paths.csv")))["dense_correct"] == ""
    with pytest.raises(ValueError, match="format"):
        write_paths(tmp_path / "paths.json", [free])


def test_a_failure_leaves_the_earlier_file(tmp_path):
    file = tmp_path / "paths.csv"
    write_paths(file, FOUR)

    def broken():
        yield FOUR[0]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_paths(file, broken())
    assert file.read_text().count("\n") == 5 and [f.name for f in tmp_path.iterdir()] == ["paths.csv"]


@pytest.mark.parametrize("kind", ["sqlite", "parquet"])
def test_a_store_is_reported_into_its_own_folder(kind, tmp_path):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    m = manifest()
    with open_store(tmp_path, m, kind) as store:
        store.put([under(m, copy.deepcopy(result)) for result in FOUR])
    with read_store(tmp_path) as store:
        report = SearchReport.of(store.results(), manifest=store.manifest)
        assert SearchReport.read(report.write(tmp_path)[0]) == report
    expected = figures(*FOUR)
    for part in ("accuracy", "repair", "breaks", "saved", "cost", "paths", "levels"):
        assert report.figures[part] == expected[part]
    with open_store(tmp_path, m) as store:  # and the search can go on
        assert len(store.done()) == 4
