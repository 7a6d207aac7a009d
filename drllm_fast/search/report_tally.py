"""Adding the units of a search up to the figures of its report, one unit after the other."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain
from typing import Any

from drllm_fast.search.figures import Mean, Ratio, Share
from drllm_fast.search.manifest import Manifest
from drllm_fast.search.static_edits import StaticEdits, edit_name
from drllm_fast.search.unit import UnitKey, UnitResult

FORMAT, FORMAT_VERSION = "drllm-fast search report", 1
COMMON = 12  # paths listed


class Unit:
    """A result, and what of its paths is right: None where that is not known."""

    def __init__(self, result: UnitResult, label_free: bool):
        self.result = result
        self.label_free = label_free
        if result.choices is not None:
            self.right = [prediction == result.answer for prediction in result.predictions]
        else:
            self.right = None if label_free else result.correct
        self.layers = len(result.paths[0])
        self.visits = self.layers - result.best.count("0") + result.best.count("2")
        self.saved = self.layers - self.visits

    @property
    def dense(self) -> bool:
        return self.right[0]

    @property
    def best(self) -> bool:
        return self.right[self.result.paths.index(self.result.best)]


class Group:
    """Counts of the units of one task, or of one level of it."""

    def __init__(self) -> None:
        self.dense, self.oracle, self.best = Share(), Share(), Share()
        self.kept, self.found, self.repaired, self.saved = Share(), Share(), Share(), Mean()

    def add(self, unit: Unit) -> None:
        self.kept.add(unit.result.kept)
        self.saved.add(unit.saved if unit.result.kept else 0)
        if unit.right is None:
            return
        self.dense.add(unit.dense)
        self.oracle.add(any(unit.right))
        self.best.add(unit.best)
        if not unit.dense:
            self.found.add(any(unit.right))
            self.repaired.add(unit.best)

    def to_dict(self) -> dict[str, Any]:
        """Shares dense, oracle, best, kept, found, repaired, and the mean saved_all, as `Tally.to_dict` says."""
        shares = {name: getattr(self, name).to_dict() for name in ("dense", "oracle", "best", "kept")}
        return shares | {
            "found": self.found.to_dict(),
            "repaired": self.repaired.to_dict(),
            "saved_all": self.saved.to_dict(),
        }


class Tally:
    """Adds units up, one after the other."""

    def __init__(self, manifest: Manifest | None):
        self.manifest = manifest
        self.reward = None if manifest is None else manifest.config.get("reward")
        self.label_free = self.reward == "kl"
        self.search: tuple[str, str, int] | None = None  # model, configuration, layers
        self.graders: Counter[str] = Counter()
        self.all = Group()
        self.tasks: dict[str, Group] = {}
        self.levels: dict[tuple[str, int], Group] = {}
        self.paired, self.control, self.difference = Share(), Share(), Mean()
        self.only = Counter()
        self.broken, self.tried, self.tried_break, self.probes_break = Share(), Mean(), Ratio(), Ratio()
        self.probes_repair = Ratio()
        self.static = StaticEdits()
        self.saved = {name: Mean() for name in ("kept", "repaired", "preserved")}
        self.totals: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.kept_paths: Counter[str] = Counter()
        self.not_finite = 0

    def add(self, result: UnitResult) -> None:
        unit = Unit(result, self.label_free)
        self._check(result.key, unit.layers)
        self.graders[result.grader] += 1
        self.all.add(unit)
        self.tasks.setdefault(result.key.task, Group()).add(unit)
        if result.level is not None:
            self.levels.setdefault((result.key.task, result.level), Group()).add(unit)
        if unit.right is not None:
            self._add_control(unit)
            self._add_breaks(unit)
        # Probes are right as `correct` is: under a label-free reward, alike with the dense path.
        self.static.add(result.key.item, result.correct[0], result.probes, result.probes_correct)
        if result.kept:
            self.saved["kept"].add(unit.saved)
            self.saved["preserved" if result.correct[0] else "repaired"].add(unit.saved)
            self.kept_paths[result.best] += 1
        for name in ("forwards", "visits", "visits_alone"):
            self.totals[name] += getattr(result, name)
        self.seconds.append(result.seconds)
        if result.scores is not None:
            self.not_finite += not all(map(math.isfinite, chain.from_iterable(result.scores)))

    def _check(self, key: UnitKey, layers: int) -> None:
        if self.manifest is not None:
            self.manifest.check_key(key)
        search = key.model, key.config, layers
        if self.search is None:
            self.search = search
        if search != self.search:
            raise ValueError(
                f"unit {key.text()!r} is of (model, configuration, layers) {search}, earlier ones of {self.search}; a "
                "report is of one search"
            )

    def _add_control(self, unit: Unit) -> None:
        reached = unit.result.control_reached
        if reached is None or unit.dense:
            return
        self.paired.add(unit.best)
        self.control.add(reached)
        self.difference.add(int(unit.best) - int(reached))
        self.only["repaired"] += unit.best and not reached
        self.only["control"] += reached and not unit.best

    def _add_breaks(self, unit: Unit) -> None:
        probes = unit.result.probes_correct
        if not unit.dense:
            if not self.label_free:
                self.probes_repair.add(sum(probes), len(probes))
            return
        tried = unit.right[1:]
        self.broken.add(not all(tried))
        self.tried.add(len(tried))
        self.tried_break.add(len(tried) - sum(tried), len(tried))
        self.probes_break.add(len(probes) - sum(probes), len(probes))

    def to_dict(self) -> dict[str, Any]:
        """search    what was searched, with what; label_free: `correct` means the dense path's own answer
        accuracy     dense; oracle: the dense path or some tried one is right; best: each unit on its `best` path, an
                     oracle figure as well; kept; not_finite: units with a score that is no finite number
        repair       of units whose dense path is wrong: found, some tried path is right; repaired, `best` is.
                     control, of those with a control: repaired and reached (the wrong answer) on the same units,
                     their paired difference, and how often only the one or the other came about
        breaks       of units whose dense path is right: units that some tried path breaks, tried paths a unit, the
                     shares of tried paths and of probes that break. probes_repair: of probes, where it is wrong
        static       see `StaticEdits.to_dict`; measure is "accuracy", or "agreement" with the dense path (label_free)
        saved        visits saved by `best`, negative where it is longer: of kept units, of those repaired and
                     preserved, and of all units with the dense path where nothing was kept. share_*: mean over L
        cost         forwards (paths run), visits of path prefixes, of the same paths one by one, seconds
        paths        of kept units: how often each block is skipped and repeated, histogram of visits, common paths
        tasks, levels  accuracy, repair and kept share of each
        """
        model, _, layers = self.search or (None, None, None)
        config = {} if self.manifest is None else self.manifest.config
        units, kept = self.all.kept.n, self.all.kept.count
        overall = self.all.to_dict()
        saved = {name: mean.to_dict() for name, mean in self.saved.items()} | {"all": overall.pop("saved_all")}
        share = {f"share_{name}": mean["mean"] / layers if mean["n"] else None for name, mean in saved.items()}
        seconds = math.fsum(filter(math.isfinite, self.seconds))
        run, alone = self.totals["visits"], self.totals["visits_alone"]
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "search": {
                "model": None if self.manifest is None else self.manifest.model,
                "model_hash": model if self.manifest is None else self.manifest.model_hash,
                "package_version": None if self.manifest is None else self.manifest.package_version,
                "layers": layers,
                "units": units,
                "tasks": {name: group.kept.n for name, group in sorted(self.tasks.items())},
                "graders": dict(sorted(self.graders.items())),
                **{name: config.get(name) for name in ("method", "reward", "simulations", "early_stop", "agree")},
                "seed": None if self.manifest is None else self.manifest.seed,
                "label_free": self.label_free,
            },
            "accuracy": {name: overall[name] for name in ("dense", "oracle", "best", "kept")}
            | {"not_finite": self.not_finite},
            "repair": {
                "found": overall["found"],
                "repaired": overall["repaired"],
                "control": {
                    "repaired": self.paired.to_dict(),
                    "reached": self.control.to_dict(),
                    "difference": self.difference.to_dict(),
                    "only_repaired": self.only["repaired"],
                    "only_reached": self.only["control"],
                },
            },
            "breaks": {
                "units": self.broken.to_dict(),
                "tried": self.tried.to_dict(),
                "tried_break": self.tried_break.to_dict(),
                "probes_break": self.probes_break.to_dict(),
                "probes_repair": self.probes_repair.to_dict(),
            },
            "static": {"measure": "agreement" if self.label_free else "accuracy"} | self.static.to_dict(),
            "saved": saved | share,
            "cost": {
                "forwards": self.totals["forwards"],
                "forwards_per_unit": self.totals["forwards"] / units if units else None,
                "forwards_per_kept": self.totals["forwards"] / kept if kept else None,
                "visits": run,
                "visits_alone": alone,
                "ratio": alone / run if run else None,
                "seconds": seconds,
            },
            "paths": self._paths(layers or 0),
            "tasks": [{"task": name} | group.to_dict() for name, group in sorted(self.tasks.items())],
            "levels": [{"task": t, "level": level} | g.to_dict() for (t, level), g in sorted(self.levels.items())],
        }

    def _paths(self, layers: int) -> dict[str, Any]:
        skipped, repeated, lengths = [0] * layers, [0] * layers, Counter()
        for path, units in self.kept_paths.items():
            for block, times in enumerate(path):
                skipped[block] += units * (times == "0")
                repeated[block] += units * (times == "2")
            lengths[layers - path.count("0") + path.count("2")] += units
        common = sorted(self.kept_paths.items(), key=lambda pair: (-pair[1], pair[0]))[:COMMON]
        return {
            "kept": self.kept_paths.total(),
            "distinct": len(self.kept_paths),
            "skipped": skipped,
            "repeated": repeated,
            "visits": {str(length): lengths[length] for length in sorted(lengths)},
            "common": [{"edit": edit_name(path), "path": path, "units": units} for path, units in common],
        }
