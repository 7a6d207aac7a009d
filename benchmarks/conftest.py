"""The `race` fixture: several implementations of one thing, checked against an oracle and then timed in turns.

pytest-benchmark times one function after another, so that whatever else the machine does in the meantime looks like a
difference between them. In a race, every round runs every implementation once, in alternating order, and the samples go
to pytest-benchmark: its tables, its JSON and its comparisons work as they always do.
"""

import itertools
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from cpuinfo import get_cpu_info
from pytest_benchmark.utils import get_commit_info

SECONDS, ROUNDS = 2.0, range(30, 1001)  # how long a race takes, about; the rounds it has
_races: dict[str, dict[str, list[float]]] = {}  # group -> implementation -> seconds of each round
_now = 0.0


def replayed_time() -> float:
    """The timer that pytest-benchmark reads: it moves on by the samples of a race that is over."""
    return _now


def pytest_collection_modifyitems(items):
    for item in items:
        if "race" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(group=_group(item), timer=replayed_time))


def _group(item) -> str:
    shape = (f"{name}={value}" for name, value in item.callspec.params.items() if name != "implementation")
    return " ".join([item.originalname.removeprefix("bench_"), *sorted(shape)])


@pytest.fixture
def race(request, benchmark):
    """race(implementations, check) in a bench function that is parametrised by `implementation` and by shapes.

    implementations  name -> function without arguments
    check            raises unless what such a function returned is right
    """

    def run(implementations, check):
        name, group = request.node.callspec.params["implementation"], _group(request.node)
        for function in implementations.values():
            check(function())
        if benchmark.disabled:
            return benchmark.pedantic(implementations[name])
        if group not in _races:
            _races[group] = _timed_in_turns(implementations)
        samples = itertools.cycle(_races[group][name])

        def step():
            global _now
            _now += next(samples)

        benchmark.extra_info.update(request.node.callspec.params)
        benchmark.pedantic(step, rounds=len(_races[group][name]))

    return run


def _timed_in_turns(implementations):
    def seconds_of(function):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    one_round = sum(min(seconds_of(f) for _ in range(5)) for f in implementations.values())
    rounds = min(max(int(SECONDS / one_round), ROUNDS[0]), ROUNDS[-1])
    samples = {name: [] for name in implementations}
    for turn in range(rounds):
        for name in list(implementations)[:: 1 if turn % 2 else -1]:
            samples[name].append(seconds_of(implementations[name]))
    return samples


def _about() -> dict[str, str]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    commit = get_commit_info()
    cpu = get_cpu_info().get("brand_raw", platform.machine())
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton,
        "commit": f"{commit['id'][:9]}{' and changes' if commit['dirty'] else ''}",
    }


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(_about())


def pytest_terminal_summary(terminalreporter):
    """The races as a table for benchmarks/README.md. Times are medians; the speed-up is over the first row."""
    if not _races:
        return
    write = terminalreporter.write_line
    write("\n" + ", ".join(f"{name} {value}" for name, value in _about().items()))
    write("| benchmark | implementation | median us | quartiles | speed-up |\n|---|---|---:|---|---:|")
    for group, samples in _races.items():
        first = statistics.median(next(iter(samples.values())))
        for name, seconds in samples.items():
            low, median, high = (1e6 * q for q in statistics.quantiles(seconds, n=4))
            speed_up = 1e6 * first / median
            write(f"| {group} | {name} | {median:.1f} | {low:.1f} - {high:.1f} | {speed_up:.2f} |")
