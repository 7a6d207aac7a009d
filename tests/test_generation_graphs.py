"""Decode steps that a CUDA graph could replay, run here as they are: the tables are filled and never made anew, and
answers are those of every row alone. Capturing itself needs a GPU."""

import random

import pytest
import torch
from families import FAMILIES, prompts, tiny
from generation_cases import Answers, Letters

from drllm_fast.generation import Engine, Sampling
from drllm_fast.generation import graphs as graphs_module
from drllm_fast.generation.graphs import SEEN, TRIALS, GraphedSteps, _bucket, wanted

CASES = [  # prompt, path, new tokens
    (5, [1, 1, 1, 1], 30), (9, [1, 0, 1, 1], 25), (1, [2, 1, 0, 1], 33), (14, [0, 0, 0, 0], 12), (3, [1, 1, 1, 1], 31),
    (7, [0, 0, 0, 1], 29), (2, [2, 2, 2, 2], 28), (20, [1, 0, 1, 1], 27), (4, [2, 1, 0, 1], 26), (6, [1, 1, 2, 1], 30),
]  # fmt: skip


class Replays(GraphedSteps):
    """Counts replays, and notes the tensors of each step, which a graph holds on to."""

    def __init__(self, *parts, **options):
        super().__init__(*parts, capture=self.captured, **options)
        self.count = 0

    def captured(self, run):
        run()  # as a capture does, for rows that stand for nobody
        run()

        def replay():
            self.count += 1
            run()

        return replay


def engine_with(model, keep=True, limit=32, required=False, **options):
    """An engine whose steps are replayed. keep: whatever is measured."""

    class Graphed(Engine):
        def __enter__(self):
            super().__enter__()
            parts = self._owner, self.pool, self.top, self._cache, self.device
            self._steps = self.replays = Replays(*parts, limit=limit, required=required)
            if keep:
                note = self._steps.note
                self._steps.note = lambda key, replayed, seconds: None if replayed else note(key, replayed, seconds)
            return self

    return Graphed(model, Letters(), **options)


def run(engine, rows, cases):
    requests = [
        engine.submit(row, Sampling(new, ignore_eos=True), path=path)
        for row, (_, path, new) in zip(rows, cases, strict=True)
    ]
    while engine.busy:
        engine.step()
    return [request.tokens for request in requests]


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_rows_equal_each_alone(family):
    model = tiny(family)
    rows = [row.tolist() for row in prompts([length for length, *_ in CASES])]
    answers = Answers(model)
    expected = [answers(row, path, new)[0] for row, (_, path, new) in zip(rows, CASES, strict=True)]
    with engine_with(model, max_batch=4, lookahead=3, kv_tokens=2000) as engine:
        assert run(engine, rows, CASES) == expected
        replays = engine.replays
        assert engine.pool.used == 0
    assert replays.count > 20 and max(replays.captures.values()) == 1


def test_tensors_of_a_step_stay_where_they_are():
    model = tiny("llama")
    rows = [row.tolist() for row in prompts([3, 8, 5, 2, 9, 4])]
    cases = [(0, path, 20) for path in ([1, 0, 1, 1], [1, 1, 1, 1]) * 3]
    with engine_with(model, max_batch=4, lookahead=2, kv_tokens=2000) as engine:
        run(engine, rows, cases)
        steps = [step for step, _ in engine.replays.graphs.values()]
        names = ("starts", "held", "written", "runs", "tokens", "positions", "cu_seqlens", "logits")
        places = [[getattr(step, name).data_ptr() for name in names] for step in steps]
        run(engine, rows[::-1], cases)
        assert [[getattr(step, name).data_ptr() for name in names] for step in steps] == places
        assert steps and engine.replays.count > 10


def test_the_last_place_of_the_pool_is_nobodys():
    """Idle rows write there, and what they leave there, NaN even, reaches no answer."""
    model = tiny("llama")
    rows = [row.tolist() for row in prompts([5, 9, 3])]
    cases = [(0, path, 24) for path in ([1, 0, 1, 1], [1, 1, 0, 1], [0, 0, 2, 1])]
    answers = Answers(model)
    expected = [answers(row, path, 24)[0] for row, (_, path, _) in zip(rows, cases, strict=True)]
    with engine_with(model, max_batch=3, lookahead=0, kv_tokens=900) as engine:
        requests = [
            engine.submit(r, Sampling(24, ignore_eos=True), path=p) for r, (_, p, _) in zip(rows, cases, strict=True)
        ]
        while engine.busy:
            engine.step()
            with torch.inference_mode():
                engine.pool.keys[:, -1] = engine.pool.values[:, -1] = torch.nan
        assert [request.tokens for request in requests] == expected and engine.replays.count


def test_few_graphs_are_kept():
    model = tiny("llama")
    rows = [row.tolist() for row in prompts([4] * 4)]
    with engine_with(model, limit=2, max_batch=1, lookahead=0, kv_tokens=900) as engine:
        for _ in range(2):
            run(engine, rows, [(0, path, 12) for path in ([1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 0])])
        assert len(engine.replays.graphs) == 2
        assert max(engine.replays.captures.values()) == 2  # each went, and came back


@pytest.mark.parametrize("slower, required", [(True, False), (False, False), (True, True)])
def test_a_graph_that_is_no_faster_is_given_up(slower, required, monkeypatch):
    """Unless graphs are asked for."""
    clock = iter(range(10**6))
    now = [0.0]

    def perf_counter():
        # Steps take 1 as they are; replayed 2 or 0.5.
        if next(clock) % 2:
            replayed = any(len(times) for times in [replays.graphs])
            now[0] += (2.0 if slower else 0.5) if replayed else 1.0
        return now[0]

    model = tiny("llama")
    row = prompts([4])[0].tolist()
    with engine_with(model, keep=False, required=required, max_batch=1, lookahead=0, kv_tokens=900) as engine:
        replays = engine.replays
        monkeypatch.setattr(graphs_module.time, "perf_counter", perf_counter)
        engine.submit(row, Sampling(40, ignore_eos=True))
        while engine.busy:
            engine.step()
        monkeypatch.undo()
        given_up = slower and not required
        assert replays.count == (TRIALS if given_up else 39 - SEEN)
        assert len(replays.slower) == given_up and len(replays.graphs) == (not given_up)


def test_what_cannot_be_captured_runs_as_it_is(caplog):
    def broken(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = tiny("llama")
    row = prompts([4])[0].tolist()
    expected = Answers(model)(row, [1, 1, 1, 1], 12)[0]
    for required in (False, True):
        with Engine(model, Letters(), max_batch=1, lookahead=0, kv_tokens=900) as engine:
            parts = engine._owner, engine.pool, engine.top, engine._cache, engine.device
            engine._steps = GraphedSteps(*parts, required=required, capture=broken)
            request = engine.submit(row, Sampling(12, ignore_eos=True))
            if required:
                with pytest.raises(RuntimeError, match="use graphs=False"):
                    while engine.busy:
                        engine.step()
                assert request.finish_reason == "error"
            else:
                while engine.busy:
                    engine.step()
                assert request.tokens == expected
                assert "without CUDA graphs" in caplog.text
            assert engine.pool.used == 0


def test_rows_come_and_go_in_any_order():
    model = tiny("qwen2")
    answers = Answers(model)
    wild = random.Random(3)
    paths = [[1, 1, 1, 1], [1, 0, 1, 1], [2, 1, 0, 1]]
    with engine_with(model, max_batch=5, lookahead=4, kv_tokens=6000) as engine:
        wanted = []
        for _ in range(40):
            row = [wild.randrange(2, 97) for _ in range(wild.randrange(1, 15))]
            path, new = wild.choice(paths), wild.randrange(1, 25)
            wanted.append((engine.submit(row, Sampling(new, ignore_eos=True), path=path), row, path, new))
            for _ in range(wild.randrange(4)):
                engine.step()
            if wild.random() < 0.2:
                engine.cancel(wild.choice(wanted)[0])
        while engine.busy:
            engine.step()
        assert engine.pool.used == 0 and engine.replays.count > 20
    for request, row, path, new in wanted:
        want = answers(row, path, new)[0]
        assert request.tokens == (want if request.finish_reason == "length" else want[: len(request.tokens)])


def test_buckets():
    assert [_bucket(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
    assert [_bucket(n, least=128) for n in (1, 128, 129)] == [128, 128, 256]


def test_graphs_are_for_cuda_devices():
    assert not wanted(None, torch.device("cpu")) and not wanted(False, torch.device("cuda"))
    assert wanted(None, torch.device("cuda")) and wanted(True, torch.device("cuda"))
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device"):
        Engine(tiny("llama"), Letters(), graphs=True)
