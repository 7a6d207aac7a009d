"""What an engine measures and keeps: costs become sizes, files are read, made again and lived without."""

import json

import pytest
from families import tiny
from generation_cases import Letters

from drllm_fast.generation import Engine, Sampling, generate
from drllm_fast.generation.calibration import StepCost, kept, step_cost


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DRLLM_FAST_CACHE", str(tmp_path))
    return tmp_path / "measured"


@pytest.mark.parametrize(
    ("visit", "row", "size"),
    [(0, 1, 8), (0.4, 1, 8), (0.41, 1, 16), (3.2, 1, 64), (3.3, 1, 128), (1e9, 1, 256), (1, 0, 256)],
)
def test_a_batch_is_large_enough_for_what_its_rows_share(visit, row, size):
    assert StepCost(fixed=5, visit=visit, row=row).batch_size() == size


def test_what_was_measured_is_kept(folder):
    calls = []

    def measure():
        calls.append(1)
        return {"seconds": 0.5}

    assert kept(["this"], "cpu", measure) == kept(["this"], "cpu", measure) == {"seconds": 0.5}
    assert len(calls) == 1
    kept(["that"], "cpu", measure)
    assert len(calls) == 2
    for file in folder.iterdir():
        assert json.loads(file.read_text())["about"][0] in ("this", "that")
        file.write_text('{"about"')  # torn
    assert kept(["this"], "cpu", measure) == {"seconds": 0.5} and len(calls) == 3
    assert kept(["this"], "cpu", measure) == {"seconds": 0.5} and len(calls) == 3


def test_a_folder_that_cannot_be_written_to_is_lived_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DRLLM_FAST_CACHE", str(tmp_path / "file"))
    assert kept(["this"], "cpu", lambda: {"seconds": 1}) == {"seconds": 1}


def test_steps_are_measured_once_and_the_sizes_follow(folder):
    model = tiny("llama")
    engine = Engine(model, Letters(), pack_weights=False)
    with engine:
        cost = step_cost(engine)
        size = engine.schedule.max_batch
        assert size == engine.schedule.lookahead == cost.batch_size()
        assert cost.fixed > 0 and cost.visit >= 0 and cost.row > 0
        assert engine.pool.used == 0 and not engine.busy
        request = engine.submit([5, 6], Sampling(3))
        while engine.busy:
            engine.step()
        assert len(request.tokens) == 3
    files = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    with Engine(model, Letters(), pack_weights=False) as again:
        assert again.schedule.max_batch == size
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == files
    assert not hasattr(model, "routing")


def test_a_few_prompts_need_no_measuring(folder):
    generate(tiny("llama"), Letters(), [[5, 6]] * 3, max_new_tokens=2, pack_weights=False)
    assert not folder.exists()
