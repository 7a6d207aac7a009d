"""A store and a worker without a model, for the tests of both; run as a program, a search to be killed.

Environment of the program: FOLDER, KIND, EXECUTOR, UNITS, CHUNK, DELAY (seconds a unit), JOURNAL (each unit searched
appends a line `unit pid` there).
"""

import os
import signal
import time
from dataclasses import dataclass, field

from drllm_fast.search.manifest import Manifest
from drllm_fast.search.store import open_store
from drllm_fast.search.unit import Item, SearchConfig, UnitKey, UnitResult, prompt_hash
from drllm_fast.search.work import work_units

CONFIG = SearchConfig(simulations=7, options={"levels": (1, 2)})
FINGERPRINT = {"structure": {"num_layers": 2}, "embedding": [0.5, -1.25], "norms": [[1.0], [1.0]]}


def manifest(config=CONFIG, **changes):
    values = {"model": "tiny", "fingerprint": FINGERPRINT, "task": {"name": "fake", "limit": None}, "seed": 3}
    return Manifest.of(config=config, **(values | changes))


def items(count):
    return [Item(f"{i:05d}", "fake", f"prompt {i}", (" a", " b"), i % 2) for i in range(count)]


def units(count):
    return work_units(items(count), manifest().model_hash, CONFIG, 3)


def result(item, **changes):
    key = UnitKey(item.task, item.id, prompt_hash(item), manifest().model_hash, CONFIG.hash(), 3)
    number = float(int(item.id))
    values = {
        "key": key, "prompt": item.prompt, "choices": list(item.choices), "answer": str(item.answer), "level": None,
        "paths": ["0-1", "0"], "rewards": [0.0, number], "correct": [False, True], "predictions": [" a", " b"],
        "scores": [[-1.0, -number], [float("-inf"), 0.1]], "best": "0", "kept": True, "control_target": " a",
        "control_reached": False, "probes": ["0"], "probes_correct": [True], "forwards": 4, "visits": 6,
        "visits_alone": 9, "grader": "choice", "seconds": 0.1,
    }  # fmt: skip
    return UnitResult(**(values | changes))


@dataclass
class FakeWorker:
    """deadly: units that kill their process; bad: units that raise; journal: a file of units searched."""

    delay: float = 0.0
    journal: str = ""
    deadly: list = field(default_factory=list)
    bad: list = field(default_factory=list)
    silent: list = field(default_factory=list)  # no result

    def run(self, given):
        for item in given:
            if item.id in self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            if item.id in self.bad:
                raise ArithmeticError(f"no path for {item.id}")
            if item.id in self.silent:
                continue
            time.sleep(self.delay)
            if self.journal:
                with open(self.journal, "a") as file:
                    file.write(f"{item.id} {os.getpid()}\n")
            yield result(item)


@dataclass
class MakeFake:
    arguments: dict

    def __call__(self):
        return FakeWorker(**self.arguments)


def main():
    environ = os.environ
    make = MakeFake({"delay": float(environ["DELAY"]), "journal": environ["JOURNAL"]})
    work, chunk = units(int(environ["UNITS"])), int(environ["CHUNK"])
    with open_store(environ["FOLDER"], manifest(), environ["KIND"]) as store:
        if environ["EXECUTOR"] == "ray":
            from drllm_fast.search.ray_executor import run_ray

            outcome = run_ray(make, work, store, workers=2, chunk=chunk)
        else:
            from drllm_fast.search import executors

            run = executors.run_local if environ["EXECUTOR"] == "local" else executors.run_ranks
            outcome = run(make, work, store, chunk=chunk)
        print(outcome, flush=True)


if __name__ == "__main__":
    main()
