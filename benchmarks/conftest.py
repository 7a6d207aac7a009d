"""The `race` fixture: several implementations of one thing, checked against an oracle and then timed in turns.

pytest-benchmark times one function after another, so that whatever else the machine does in the meantime looks like a
difference between them. In a race, every round runs every implementation once, in alternating order, and the samples go
to pytest-benchmark: its tables, its JSON and its comparisons work as they always do.

Beside each time stand the bytes and the FLOPs that the work takes at least, and which share of this machine's ceilings
that is: of the bandwidth of copying and of the rate of multiplying matrices, measured in the same run.
"""

import functools
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
_work: dict[str, tuple] = {}  # group -> bytes, flops, dtype
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
    """race(implementations, check, moved=, flops=, dtype=) in a bench function that is parametrised by `implementation`
    and by shapes.

    implementations  name -> function without arguments
    check            raises unless what such a function returned is right
    moved, flops     bytes read and written at least, and floating-point operations; None where neither is the point
    dtype            in which the FLOPs could be done
    """

    def run(implementations, check, *, moved=None, flops=None, dtype=torch.float32):
        name, group = request.node.callspec.params["implementation"], _group(request.node)
        for function in implementations.values():
            check(function())
        if benchmark.disabled:
            return benchmark.pedantic(implementations[name])
        if group not in _races:
            _races[group] = _timed_in_turns(implementations)
            _work[group] = moved, flops, dtype
        samples = itertools.cycle(_races[group][name])

        def step():
            global _now
            _now += next(samples)

        benchmark.extra_info.update(request.node.callspec.params)
        benchmark.extra_info.update({"bytes": moved, "flops": flops})
        benchmark.pedantic(step, rounds=len(_races[group][name]))

    return run


def _timed_in_turns(implementations, allowed=ROUNDS):
    def seconds_of(function):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    one_round = sum(min(seconds_of(f) for _ in range(5)) for f in implementations.values())
    rounds = min(max(int(SECONDS / one_round), allowed[0]), allowed[-1])
    samples = {name: [] for name in implementations}
    for turn in range(rounds):
        for name in list(implementations)[:: 1 if turn % 2 else -1]:
            samples[name].append(seconds_of(implementations[name]))
    return samples


def _best_seconds(function, rounds=15):
    return min(_timed_in_turns({"": function}, range(rounds, rounds + 1))[""])


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read and written a second when 256 MiB are copied."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(2**28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_seconds(lambda: target.copy_(source))


@functools.cache
def matmul_rate(dtype: torch.dtype) -> float:
    """FLOPs a second of a product of square matrices."""
    device, n = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    return 2 * n**3 / _best_seconds(lambda: a @ b)


def _shares(group: str, seconds: float) -> str:
    def cells(work, ceiling):
        return "- | -" if work is None else f"{work / 1e6:.3g} | {work / seconds / ceiling():.2f}"

    moved, flops, dtype = _work[group]
    return f"{cells(moved, copy_bandwidth)} | {cells(flops, lambda: matmul_rate(dtype))}"


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
    """The races as a table for benchmarks/README.md. Times are medians; the speed-up is over the first row; `of copy`
    and `of matmul` are shares of the ceilings, above 1 for what fits into a cache."""
    if not _races:
        return
    write = terminalreporter.write_line
    write("\n" + ", ".join(f"{name} {value}" for name, value in _about().items()))
    write(f"copies {copy_bandwidth() / 1e9:.3g} GB/s (256 MiB, read and written)")
    for dtype in dict.fromkeys(dtype for _, flops, dtype in _work.values() if flops):
        write(f"multiplies {matmul_rate(dtype) / 1e9:.4g} GFLOP/s in {dtype}")
    write("| benchmark | implementation | median us | quartiles | speed-up | MB | of copy | MFLOP | of matmul |")
    write("|---|---|---:|---|---:|---:|---:|---:|---:|")
    for group, samples in _races.items():
        first = statistics.median(next(iter(samples.values())))
        for name, seconds in samples.items():
            low, median, high = (1e6 * q for q in statistics.quantiles(seconds, n=4))
            speed_up = 1e6 * first / median
            shares = _shares(group, median / 1e6)
            write(f"| {group} | {name} | {median:.1f} | {low:.1f} - {high:.1f} | {speed_up:.2f} | {shares} |")
