"""`drllm-fast search` in processes of its own: killed, interrupted, on Ray, as ranks; always the same results."""

import signal
import socket
import time

import pytest
from cli_cases import call, ended, quiz, results, start, tiny_folder, without_cost

pytest.importorskip("pyarrow")

LONG = ("--simulations", "200", "--no-early-stop", "--together", "1", "--threads", "1")
COUNT = 30
DEADLINE = 120.0  # seconds, for what takes ten


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A task that takes seconds, and the results of a search of it in one go."""
    folder = tmp_path_factory.mktemp("whole")
    task = quiz(folder / "quiz.jsonl", COUNT)
    ended(call(*command(model, task, folder / "out")[2:]))
    return task, without_cost(results(folder / "out"))


def command(model, task, output, *more):
    return ["-m", "drllm_fast.cli", "search", "--model", str(model), "--task", str(task), "--output", str(output),
            *LONG, *more]  # fmt: skip


def stop(process, output, number, least):
    """Send a signal as soon as `least` units are stored; returns what is stored then, and stderr."""
    end = time.monotonic() + DEADLINE
    try:
        while not (output / "units.sqlite").exists() or len(results(output)) < least:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    found = results(output)
    assert least <= len(found) < COUNT
    return found, err


def test_killed_then_interrupted_then_ended(model, whole, tmp_path):
    task, expected = whole
    output = tmp_path / "out"
    arguments = command(model, task, output)
    process = start(*arguments)
    killed, _ = stop(process, output, signal.SIGKILL, 4)
    assert process.returncode == -signal.SIGKILL and not (output / "report.json").exists()

    process = start(*arguments)
    interrupted, err = stop(process, output, signal.SIGINT, len(killed) + 4)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert f"stored in {output}, run the same command to go on" in err
    assert all(result in interrupted for result in killed) and not (output / "report.json").exists()

    last = ended(call(*arguments[2:]))
    assert f"{COUNT} prompts, {len(interrupted)} of them searched before" in last.stderr
    assert without_cost(results(output)) == expected and (output / "report.json").exists()


def test_ray_finds_the_same(model, whole, tmp_path):
    pytest.importorskip("ray")
    task, expected = whole
    process = start(*command(model, task, tmp_path / "out", "--executor", "ray", "--workers", "2"))
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert without_cost(results(tmp_path / "out")) == expected and "dense path" in out


def test_two_ranks_find_the_same(model, whole, tmp_path):
    task, expected = whole
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    more = ["--executor", "torchrun", "--store", "parquet"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    process = start(*launcher, *command(model, task, tmp_path / "out", *more))
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert without_cost(results(tmp_path / "out")) == expected and "dense path" in out
