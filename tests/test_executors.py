"""Executors: every unit once, none lost, none twice, whoever is killed and when."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from datetime import timedelta
from pathlib import Path

import pytest
from search_cases import FakeWorker, MakeFake, items, manifest, result, units

from drllm_fast.search import executors, work
from drllm_fast.search.executors import run_local, run_ranks
from drllm_fast.search.interrupts import Interrupts
from drllm_fast.search.store import open_store
from drllm_fast.search.work import Queue, UnitsFailed, Writer, chunks

PROGRAM = Path(__file__).with_name("search_cases.py")
LIGHT = PROGRAM.with_name("light")  # a place from which processes start fast
PYTHONPATH = os.pathsep.join([str(LIGHT), *(path for path in sys.path if path)])
RANKS = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.1"]
DEADLINE = 150.0  # seconds, for what takes five on a machine that has nothing else to do


@pytest.fixture(params=["sqlite", "parquet"])
def store(request, tmp_path):
    with open_store(tmp_path / "out", manifest(), request.param) as store:
        yield store


@pytest.fixture(autouse=True)
def interruptible():
    """Also where the tests are a background job, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Count:
    def __init__(self):
        self.items = []

    def advance(self, result):
        self.items.append(result.key.item)


def start(executor, tmp_path, count, *, kind="sqlite", chunk=4, delay=0.001):
    """The same command, each time."""
    environ = os.environ | {
        "FOLDER": str(tmp_path / "out"), "KIND": kind, "EXECUTOR": executor, "UNITS": str(count), "CHUNK": str(chunk),
        "DELAY": str(delay), "JOURNAL": str(tmp_path / "journal"), "PYTHONPATH": PYTHONPATH,
    }  # fmt: skip
    launcher = [*RANKS, "--master-port", str(free_port())] if executor == "ranks" else [sys.executable]
    return subprocess.Popen(
        [*launcher, str(PROGRAM)], env=environ, cwd=LIGHT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def journal(tmp_path):
    """(unit, pid) of each unit that was searched, in order."""
    try:
        lines = (tmp_path / "journal").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(line.split()[0], int(line.split()[1])) for line in lines if len(line.split()) == 2]


def wait_for(tmp_path, searched, process):
    """The journal when it has so many lines, of a process that runs."""
    end = time.monotonic() + DEADLINE
    while len(lines := journal(tmp_path)) < searched:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    return lines


def wait_until_gone(pids):
    end = time.monotonic() + DEADLINE
    while any(running(pid) for pid in pids):
        assert time.monotonic() < end, pids
        time.sleep(0.02)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check_complete(tmp_path, count, again):
    """Every unit is stored once, and at most `again` were searched twice."""
    with open_store(tmp_path / "out", manifest()) as store:
        assert list(store.results()) == [result(item) for item in items(count)]
        assert len(store.done()) == count and store.duplicates == 0
    searched = Counter(unit for unit, _ in journal(tmp_path))
    assert len(searched) == count
    assert sum(searched.values()) - count <= again


# -- in this process
def test_local(store):
    progress = Count()
    outcome = run_local(MakeFake({}), units(10), store, chunk=3, progress=progress)
    assert (outcome.found, outcome.finished, outcome.complete) == (0, 10, True)
    assert progress.items == [item.id for item in items(10)]
    assert list(store.results()) == [result(item) for item in items(10)]


def test_what_is_stored_is_not_searched_and_no_worker_is_made(store):
    run_local(MakeFake({}), units(4), store)
    progress = Count()
    outcome = run_local(MakeFake({}), [*units(6), *units(6)], store, progress=progress)
    assert progress.items == ["00004", "00005"] and (outcome.found, outcome.finished) == (4, 2)
    assert run_local(lambda: 1 / 0, units(6), store).complete


def test_units_that_fail_are_named_and_the_rest_goes_on(store):
    make = MakeFake({"bad": ["00003"], "silent": ["00006"]})
    with pytest.raises(UnitsFailed, match="2 units failed, 8 were searched and stored. fake/00003: ArithmeticError: no "
                       "path for 00003; fake/00006: the worker ended without its result") as error:  # fmt: skip
        run_local(make, units(10), store, chunk=4)
    assert len(error.value.failed) == 2 and len(store.done()) == 8
    outcome = run_local(MakeFake({}), units(10), store, chunk=4)
    assert outcome.finished == 2 and outcome.complete


def test_many_failures_end_the_search(store):
    made = []

    def make():
        made.append(1)
        return FakeWorker(bad=[item.id for item in items(500)])

    with pytest.raises(UnitsFailed, match=f"{work.MANY_FAILED} units failed, 0 were .*; and 5 more"):
        run_local(make, units(500), store, chunk=10)
    assert made == [1]


def test_a_result_that_nobody_asked_for(store):
    class Wrong:
        def run(self, given):
            yield result(items(5)[4])

    with pytest.raises(ValueError, match="was not asked for"):
        run_local(Wrong, units(2), store)
    assert store.done() == set()


def test_a_full_disk_is_no_failure_of_a_unit(store, monkeypatch):
    def full(results):
        raise OSError("cannot write")

    monkeypatch.setattr(store, "put", full)
    with pytest.raises(OSError, match="cannot write"):
        run_local(MakeFake({}), units(3), store)


def test_chunks():
    assert [len(chunk) for chunk in chunks(units(7), 3)] == [3, 3, 1]
    with pytest.raises(ValueError, match="chunk is 0"):
        chunks(units(7), 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stores_what_is_finished(store, number):
    class Interrupted(FakeWorker):
        def run(self, given):
            for found in super().run(given):
                yield found
                if found.key.item == "00004":
                    os.kill(os.getpid(), number)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match=f"stored in {store.folder}, run the same command to go on"):
        run_local(Interrupted, units(9), store, chunk=9)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert len(store.done()) == 5
    assert run_local(MakeFake({}), units(9), store).found == 5


def test_an_interrupt_waits_while_results_are_stored(store):
    put, seen = store.put, []

    def interrupted_put(results):
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(len(results))
        return put(results)

    store.put, store.batch_seconds = interrupted_put, 0.0
    with pytest.raises(KeyboardInterrupt, match="run the same command"):
        run_local(MakeFake({}), units(9), store)
    assert seen == [1] and len(store.done()) == 1


def test_interrupts_leave_an_ignored_signal_and_other_threads_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    failures = []

    def elsewhere():
        try:
            with Interrupts() as interrupts, interrupts.shielded():
                pass
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not failures


def test_results_are_collected_for_a_while(store, monkeypatch):
    clock, puts = [0.0], []
    monkeypatch.setattr(work.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(store, "put", lambda results: puts.append(len(results)))
    store.batch_seconds = 10.0
    with Interrupts() as interrupts:
        writer = Writer(store, interrupts, None)
        for seconds, item in zip([1, 9, 11, 12, 40], items(5), strict=True):  # a slow unit's result does not wait
            clock[0] = float(seconds)
            writer.add(result(item))
        assert puts == [3, 2]
        writer.flush()
    assert puts == [3, 2]


def test_a_deadly_unit_is_given_up_and_its_neighbours_are_not():
    queue = Queue(deque(chunks(units(3), 3)))
    while queue.waiting:
        chunk = queue.waiting.popleft()
        if any(unit.item.id == "00001" for unit in chunk):
            queue.died(chunk, "killed")
        else:
            queue.finished += 1
    assert [key.split("|")[1] for key in queue.failed] == ["00001"] and queue.finished == 2
    with pytest.raises(UnitsFailed, match="fake/00001: its worker died 3 times: killed"):
        queue.raise_failures()


@pytest.mark.parametrize("kind", ["sqlite", "parquet"])
def test_local_killed_and_resumed(tmp_path, kind):
    process = start("local", tmp_path, 600, kind=kind)
    wait_for(tmp_path, 200, process)
    process.kill()
    process.communicate()
    at_kill = len(journal(tmp_path))
    with open_store(tmp_path / "out", manifest()) as store:
        stored = len(store.done())
        # SQLite has each result at once; a shard is written every ten seconds.
        assert at_kill - 1 <= stored <= at_kill if kind == "sqlite" else stored <= at_kill
        run_local(MakeFake({"journal": str(tmp_path / "journal")}), units(600), store)
    check_complete(tmp_path, 600, again=at_kill - stored)


# -- ranks
@pytest.fixture
def no_agent(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def test_ranks_without_an_agent_share_out_by_number(store, monkeypatch, no_agent):
    seen = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        progress = Count()
        outcome = run_ranks(MakeFake({}), units(10), store, chunk=2, progress=progress)
        assert outcome.how == f"units {rank}, {rank + 3}, ... of 10" and outcome.complete == (rank == 2)
        assert progress.items == [item.id for item in items(10)[rank::3]]
        seen += progress.items
    assert sorted(seen) == [item.id for item in items(10)]


def test_ranks_that_start_late_do_not_overlap(store, monkeypatch):
    """A rank that finds units stored when it starts counts them all the same."""
    numbers = iter(range(1, 100))
    monkeypatch.setattr(executors, "_agent_counter", lambda: lambda: next(numbers))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    next(numbers), next(numbers)  # another rank's
    store.put([result(item) for item in items(10)[:3]])
    progress = Count()
    outcome = run_ranks(MakeFake({}), units(10), store, chunk=2, progress=progress)
    assert progress.items == [item.id for item in items(10)[4:]] and not outcome.complete


def test_a_lost_agent_ends_a_rank_without_an_error(store, monkeypatch, caplog):
    def lost():
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(executors, "_agent_counter", lambda: lost)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not run_ranks(MakeFake({}), units(4), store).complete
    assert "agent is gone" in caplog.text


def test_an_agent_that_is_gone_at_the_start_is_not_waited_for(store, monkeypatch):
    monkeypatch.setattr(executors, "AGENT_ANSWERS", timedelta(seconds=0.5))
    place = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**place, "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="agent does not answer at 127.0.0.1"):
        run_ranks(MakeFake({}), units(4), store)
    assert time.monotonic() - began < 20 and not store.done()


@pytest.mark.parametrize(("rank", "world", "message"), [("", "", "torchrun"), ("2", "2", "need 0 <= RANK")])
def test_ranks_need_a_launcher(store, monkeypatch, no_agent, rank, world, message):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=message):
        run_ranks(MakeFake({}), units(1), store)


def test_torchrun_killed_and_resumed(tmp_path):
    """A rank, then the launcher; each time the same command goes on."""
    process = start("ranks", tmp_path, 2000)
    lines = wait_for(tmp_path, 500, process)
    os.kill(lines[-1][1], signal.SIGKILL)
    output = process.communicate(timeout=DEADLINE)[0]  # torchrun stops the other rank
    assert process.returncode != 0 and "every finished unit is stored" in output
    first = len(journal(tmp_path))
    assert first < 2000

    process = start("ranks", tmp_path, 2000)
    lines = wait_for(tmp_path, first + 300, process)
    process.kill()
    process.communicate(timeout=DEADLINE)
    # Its ranks draw no more and end; what they store until then counts.
    wait_until_gone({pid for _, pid in lines})
    assert len(journal(tmp_path)) < 2000

    with open_store(tmp_path / "out", manifest()) as store:
        run_local(MakeFake({"journal": str(tmp_path / "journal")}), units(2000), store)
    check_complete(tmp_path, 2000, again=2 + 2)


def test_a_worker_is_given_whole_chunks(store):
    sizes = []

    class Sized(FakeWorker):
        def run(self, given):
            sizes.append(len(given))
            yield from super().run(given)

    run_local(Sized, units(7), store, chunk=3)
    assert sizes == [3, 3, 1]


# -- Ray
@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    before, folder = os.environ.get("PYTHONPATH"), os.getcwd()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": PYTHONPATH}
    os.chdir(LIGHT)  # which Ray puts first in its processes' path
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    finally:
        os.chdir(folder)
        os.environ.pop("PYTHONPATH")
        os.environ |= {"PYTHONPATH": before} if before is not None else {}
    yield ray
    ray.shutdown()


@pytest.fixture
def run_ray(cluster):
    from drllm_fast.search.ray_executor import run_ray

    return run_ray


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)  # Ray takes its time
def test_ray_gives_up_a_deadly_unit_and_goes_on(run_ray, store, tmp_path):
    """Its worker dies three times, whatever it shared a chunk with; another unit raises."""
    make = MakeFake({"deadly": ["00005"], "bad": ["00009"], "silent": ["00010"], "journal": str(tmp_path / "journal")})
    progress = Count()
    with pytest.raises(UnitsFailed, match="3 units failed, 17 were searched") as error:
        run_ray(make, units(20), store, workers=2, chunk=4, progress=progress, num_cpus=0.5)
    reasons = {key.split("|")[1]: reason for key, reason in error.value.failed.items()}
    assert reasons["00009"] == "ArithmeticError: no path for 00009" and "without its result" in reasons["00010"]
    assert reasons["00005"].startswith("its worker died 3 times")
    assert sorted(progress.items) == [r.key.item for r in store.results()] and len(progress.items) == 17
    outcome = run_ray(MakeFake({}), units(20), store, workers=2)
    assert (outcome.found, outcome.finished, outcome.deaths, outcome.complete) == (17, 3, 0, True)
    assert store.duplicates == 0


def test_ray_stops_when_a_worker_cannot_be_made(run_ray, tmp_path):
    def make():
        raise LookupError("no such model")

    with open_store(tmp_path / "out", manifest()) as store:
        with pytest.raises(RuntimeError, match="the worker could not be made: LookupError: no such model"):
            run_ray(make, units(2), store, workers=1)
        with pytest.raises(ValueError, match="workers is 0"):
            run_ray(make, units(2), store, workers=0)


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)  # Ray takes its time
def test_ray_interrupted(run_ray, store):
    class Interrupting(Count):
        def advance(self, result):
            super().advance(result)
            if len(self.items) == 5:
                os.kill(os.getpid(), signal.SIGINT)

    progress = Interrupting()
    with pytest.raises(KeyboardInterrupt, match="run the same command to go on"):
        run_ray(MakeFake({}), units(100), store, workers=1, chunk=3, progress=progress)
    assert len(store.done()) == 5 == len(progress.items)


def test_ray_killed_and_resumed(run_ray, tmp_path):
    """A worker, then the driver."""
    process = start("ray", tmp_path, 2000)
    lines = wait_for(tmp_path, 500, process)
    victim = lines[-1][1]
    os.kill(victim, signal.SIGKILL)
    lines = wait_for(tmp_path, len(lines) + 500, process)
    assert len({pid for _, pid in lines}) >= 2 and victim not in {pid for _, pid in lines[-100:]}
    process.kill()
    process.communicate(timeout=DEADLINE)
    wait_until_gone({pid for _, pid in lines})
    assert len(journal(tmp_path)) < 2000
    with open_store(tmp_path / "out", manifest()) as store:
        outcome = run_ray(MakeFake({"journal": str(tmp_path / "journal")}), units(2000), store, workers=2, chunk=4)
    assert outcome.complete and outcome.found + outcome.finished == 2000 and outcome.found > 900
    # The worker's chunk, and what two workers had streamed to the driver that it had not stored.
    check_complete(tmp_path, 2000, again=4 + 2 * 4)


def test_ray_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "drllm_fast.search.ray_executor", raising=False)
    with pytest.raises(ImportError, match=r'pip install "drllm-fast\[ray\]"'):
        __import__("drllm_fast.search.ray_executor")
