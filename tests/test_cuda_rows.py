"""The CUDA row kernels, compiled for the host (tests/cuda_emulation), against the oracles of tests/test_rows.py.

Sizes come from the kernels' own: 128 threads, warps of 32, accesses of 16 bytes. The kernels run as they are and under
the address, undefined-behaviour and thread sanitizers; there with so few blocks that their loops over blocks run."""

import itertools
import math
import os
import random
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from test_rows import llama_norm, norm_bound, oracle_gather, oracle_visits

ROOT = Path(__file__).parent.parent
SOURCES, EMULATION = ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda_emulation"
THREADS, WARP, VECTOR = 128, 32, 16
BUILDS = {
    "plain": ["-O1"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O0", "-fsanitize=thread"],
}
FEW_BLOCKS = ("kMaxBlocks = 1 << 16;", "kMaxBlocks = 2;")
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
VISIT, GATHER, SCATTER, SCATTER_ADD, NORM = range(5)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@dataclass
class Case:
    """A launch: its parameters and input tensors, its outputs as (dtype, shape), and by how much which are shifted."""

    op: int
    parameters: list[int]
    inputs: list[torch.Tensor]
    outputs: list[tuple[torch.dtype, list[int]]]
    shifts: dict[int, int] = field(default_factory=dict)

    def pack(self):
        contents = [bytes(x.contiguous().view(-1).view(torch.uint8).tolist()) for x in self.inputs]
        sizes = [len(content) for content in contents]
        sizes += [math.prod(shape) * dtype.itemsize for dtype, shape in self.outputs]
        parameters = self.parameters + [0] * (8 - len(self.parameters))
        head = [self.op, *parameters, len(self.inputs), len(self.outputs)]
        head += [n for i, size in enumerate(sizes) for n in (size, self.shifts.get(i, 0))]
        return struct.pack(f"{len(head)}q", *head) + b"".join(contents)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """driver(build, *edits) -> run, which runs the kernels, edited, on cases and returns the outputs of each."""
    built = {}

    def build(name, *edits):
        if (name, edits) in built:
            return built[name, edits]
        folder = tmp_path_factory.mktemp(name)
        sources = Path(shutil.copytree(SOURCES, folder / "cuda"))
        text = (sources / "rows.cu").read_text()
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (sources / "rows.cu").write_text(text)
        compiler = ["g++", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-g", *BUILDS[name], "-pthread"]
        include = ["-I", EMULATION, "-I", SOURCES]
        main = tmp_path_factory.getbasetemp() / f"{name}.o"
        if not main.exists():
            subprocess.run([*compiler, *include, "-c", EMULATION / "rows_main.cpp", "-o", main], check=True)
        kernels = ["-x", "c++", sources / "rows.cu", "-x", "none"]
        subprocess.run([*compiler, *include, *kernels, main, "-o", folder / "driver"], check=True)

        def run(cases):
            (folder / "cases").write_bytes(b"".join(case.pack() for case in cases))
            command = [folder / "driver", folder / "cases", folder / "results"]
            options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
            ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=options)
            if ran.returncode:
                raise RuntimeError(ran.stderr[-10_000:])
            return unpack(cases, (folder / "results").read_bytes())

        built[name, edits] = run
        return run

    return build


def unpack(cases, results):
    at, outputs = 0, []
    for case in cases:
        outputs.append([])
        for dtype, shape in case.outputs:
            size = math.prod(shape) * dtype.itemsize
            raw = torch.tensor(list(results[at : at + size]), dtype=torch.uint8)
            outputs[-1].append(raw.view(dtype).reshape(shape))
            at += size
    assert at == len(results)
    return outputs


@pytest.fixture(params=["plain", "address"])
def kernels(request, driver):
    return driver(request.param, *([] if request.param == "plain" else [FEW_BLOCKS]))


def visit_case(decisions, lengths, spare):
    ends, tokens = list(itertools.accumulate(lengths, initial=0)), sum(lengths) + spare
    inputs = [torch.tensor(decisions, dtype=torch.int8), torch.tensor(ends, dtype=torch.int32)]
    rows = len(decisions)
    outputs = [(torch.int64, [2, tokens]), (torch.int32, [2, rows + 1]), (torch.int32, [2, rows])]
    return Case(VISIT, [rows, tokens], inputs, outputs)


def visit_batches():
    draw = random.Random(0)
    for rows in (0, 1, 2, WARP - 1, WARP, WARP + 1, THREADS - 1, THREADS, THREADS + 1, 2 * THREADS + 5):
        yield draw.choices([0, 1, 2], k=rows), draw.choices([0, 1, 2, 5], k=rows), draw.choice([0, 1, THREADS + 1])
    for decision in (0, 1, 2, 127, -128):
        yield [decision] * (THREADS + 1), [1] * (THREADS + 1), 0
    yield [2, 2], [0, 0], 0
    yield [1, 2, 0], [3 * THREADS - 1, 1, 4], 0
    yield [1, 2, 1], [0, 2 * THREADS + 1, 0], 1


def test_visit_rows(kernels):
    batches = list(visit_batches())
    for batch, out in zip(batches, kernels([visit_case(*batch) for batch in batches]), strict=True):
        decisions, lengths, spare = batch
        assert tuple(x.tolist() for x in out) == oracle_visits(decisions, lengths, sum(lengths) + spare)


def apart(x, gap):
    """x [T, d] as memory in which `gap` elements lie between its rows, and none behind the last."""
    padded = torch.nn.functional.pad(x, (0, gap), value=1)
    return padded.reshape(-1)[: max(padded.numel() - gap, 0)]


def draw_index(draw, rows, count):
    """count entries: distinct rows in any order, and -1 for the rest."""
    index = draw.sample(range(rows), min(rows, max(count - 1 - count // 4, 0)))
    index += [-1] * (count - len(index))
    draw.shuffle(index)
    return index


def values(rows, columns, dtype):
    return torch.arange(1, rows * columns + 1).reshape(rows, columns).remainder(251).to(dtype)


def moved():
    """(dtype, columns, gaps of x and y, shifts): every width of access, and every size of row next to a block's."""
    for size in (1, 15, 16, 17, 2 * VECTOR + 5, THREADS, THREADS + 1):  # a byte at a time up to 16
        yield torch.uint8, size, (0, 0), {}
    for columns in (1, THREADS - 1, THREADS, THREADS + 1, 2 * THREADS + 5):
        yield torch.float32, 4 * columns, (0, 0), {}
    for unit in (2, 4, 8, 16):  # bytes by which the address of x, of y or of the output, or a distance is divisible
        for which in (0, 2, 3):
            yield torch.int16, 24, (0, 0), {which: unit}
        yield torch.int16, 24, (unit // 2, 0), {}
        yield torch.int16, 24, (0, unit // 2), {}
        yield torch.int16, 3 * unit // 2, (0, 0), {}
    yield torch.int16, 9, (7, 7), {}  # rows apart that can be moved 16 bytes at a time, and are no multiple of it
    yield torch.complex128, 3, (1, 2), {}
    yield torch.bool, 5, (1, 0), {}


def moves(scatter):
    draw = random.Random(1)
    for dtype, columns, gaps, shifts in moved():
        per_block = THREADS // min(THREADS, 1 << (columns - 1).bit_length())
        for rows in {0, 1, 3, 2 * per_block + 5} if columns < 20 else {1, 7}:
            index = draw_index(draw, rows, draw.choice([0, rows, rows + 3]))
            x, y = values(rows, columns, dtype), values(len(index), columns, dtype).flip(0)
            yield Move(scatter, x, index, y, gaps, shifts)
    yield Move(scatter, torch.zeros(4, 0), [1, -1], torch.zeros(2, 0), (0, 0), {})
    x = values(2 * THREADS + 5, 1, torch.uint8)
    for count in (THREADS - 1, THREADS, THREADS + 1, 2 * THREADS + 5):
        yield Move(scatter, x, draw_index(draw, len(x), count), values(count, 1, torch.uint8), (0, 0), {})


@dataclass
class Move:
    op: int
    x: torch.Tensor
    index: list[int]
    y: torch.Tensor
    gaps: tuple[int, int]
    shifts: dict[int, int]

    def case(self):
        (rows, columns), size = self.x.shape, self.x.element_size()
        x_stride, y_stride = ((columns + gap) * size for gap in self.gaps)
        type_ = TYPES.get(self.x.dtype, -1)
        inputs = [apart(self.x, self.gaps[0]), torch.tensor(self.index, dtype=torch.int64)]
        shape, shifts = [rows, columns], self.shifts
        if self.op == GATHER:
            shape = [len(self.index), columns]
            shifts = {which - (which == 3): by for which, by in shifts.items() if which != 2}
        else:
            inputs.append(apart(self.y, self.gaps[1]))
        parameters = [type_, rows, x_stride, y_stride, columns * size, columns]
        return Case(self.op, parameters, inputs, [(self.x.dtype, shape)], shifts)

    def expected(self):
        if self.op == GATHER:
            return torch.tensor(oracle_gather(self.x, self.index), dtype=self.x.dtype).reshape(
                len(self.index), self.x.shape[1]
            )
        out = self.x.clone()
        for i, row in enumerate(self.index):
            if row >= 0:
                out[row] = self.y[i] + out[row] if self.op == SCATTER_ADD else self.y[i]
        return out


def check_moves(kernels, moves):
    for move, (out,) in zip(moves, kernels([move.case() for move in moves]), strict=True):
        assert torch.equal(out, move.expected()), move


@pytest.mark.parametrize("op", [GATHER, SCATTER], ids=["gather", "scatter"])
def test_gather_and_scatter(kernels, op):
    check_moves(kernels, list(moves(op)))


def test_gather_may_repeat_rows(kernels):
    x = values(3, 5, torch.float32)
    check_moves(kernels, [Move(GATHER, x, [2, -1, 2, 0, -1, 2, 2], x, (0, 0), {})])


def test_a_row_named_twice_gets_the_last(kernels):
    """Refused where it can be seen; on a device at least the same thing happens every time."""
    x, index = values(5, 3, torch.float32), [3, 1, 3, 1, 3]
    check_moves(kernels, [Move(SCATTER, x, index, 2 * x, (0, 0), {})])


def additions():
    draw, generator = random.Random(2), torch.Generator().manual_seed(0)
    for dtype in TYPES:
        pack = VECTOR // dtype.itemsize
        columns = [1, 3, pack, pack + 1, pack * THREADS, pack * (THREADS + 1), 2 * THREADS + 5]
        settings = [(width, (0, 0), {}) for width in columns]
        settings += [(2 * pack, (0, 0), {which: dtype.itemsize}) for which in (0, 2, 3)]
        settings += [(2 * pack, (0, 0), {0: 16}), (2 * pack, (1, 0), {}), (2 * pack, (0, 1), {}), (5, (2, 3), {})]
        settings += [(pack + 1, (pack - 1, pack - 1), {})]
        for width, gaps, shifts in settings:
            for rows in (0, 2, 2 * (THREADS // 4) + 5) if width < 4 else (5,):
                index = draw_index(draw, rows, draw.choice([0, rows, rows + 3]))
                x, y = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, len(index)))
                yield Move(SCATTER_ADD, x, index, y, gaps, shifts)


def test_scatter_add(kernels):
    check_moves(kernels, list(additions()))


def norm_case(x, index, weight, eps, gap=0, shifts=None):
    (rows, columns), dtype = x.shape, x.dtype
    bits = struct.unpack("q", struct.pack("d", eps))[0]
    stride = (columns + gap) * x.element_size()
    inputs = [apart(x, gap), torch.tensor(index, dtype=torch.int64), weight]
    shape = [len(index), columns]
    parameters = [TYPES[dtype], rows, stride, 0, 0, columns, bits]
    return Case(NORM, parameters, inputs, [(dtype, shape), (dtype, shape)], shifts or {})


def norms():
    generator = torch.Generator().manual_seed(0)
    for dtype in TYPES:
        pack = VECTOR // dtype.itemsize
        widths = [1, WARP - 1, WARP, WARP + 1, THREADS - 1, THREADS, THREADS + 1, 2 * THREADS + 5]
        settings = [(pack * width, 0, {}) for width in widths] + [(width, 0, {}) for width in widths]
        settings += [(2 * pack, 0, {which: dtype.itemsize}) for which in (0, 2, 3, 4)]
        settings += [(2 * pack, 1, {}), (pack + 1, pack - 1, {})]
        for columns, gap, shifts in settings:
            size = 10.0 ** (len(shifts) - columns % 3)
            x = (size * torch.randn(4, columns, generator=generator)).to(dtype)
            weight = (1 + torch.randn(columns, generator=generator) / 4).to(dtype)
            yield x, [2, -1, 0, 2, 3], weight, 1e-5, gap, shifts
        yield x, [], weight, 1e-5
        yield x, [-1], torch.full_like(weight, torch.nan), 1e-5
    yield torch.zeros(2, 0), [1, -1], torch.zeros(0), 1e-5
    yield torch.ones(1, 4), [0], torch.ones(4), 3.0


def test_gather_rms_norm(kernels):
    given = list(norms())
    for (x, index, weight, eps, *_), (gathered, normed) in zip(
        given, kernels([norm_case(*g) for g in given]), strict=True
    ):
        real = [i for i, row in enumerate(index) if row >= 0]
        assert torch.equal(gathered, torch.tensor(oracle_gather(x, index), dtype=x.dtype).reshape(gathered.shape))
        assert not normed[[i for i, row in enumerate(index) if row < 0]].any()
        if normed[real].numel():
            exact, bound = norm_bound(x[[index[i] for i in real]], weight, eps)
            bound = bound if x.dtype != torch.float64 else 1e-13 * float(exact.abs().max())
            assert (normed[real].double() - exact).abs().max() <= bound, (x.dtype, x.shape)


def test_the_norm_is_rounded_before_the_weight(kernels):
    for dtype in (torch.bfloat16, torch.float16):
        x, three = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).to(dtype), torch.full([96], 3.0)
        ((_, normed),) = kernels([norm_case(x, [0, 1, 2], three.to(dtype), 1e-6)])
        assert (normed - llama_norm(x, three.to(dtype), 1e-6)).abs().max() <= 2**-6
        ((_, unit),) = kernels([norm_case(x, [0, 1, 2], torch.ones(96, dtype=dtype), 1e-6)])
        assert torch.equal(normed, 3 * unit)


BAD = values(3, 5, torch.float32)


@pytest.mark.parametrize("position", [-2, 3, 2**40])
@pytest.mark.parametrize("op", [GATHER, SCATTER, SCATTER_ADD, NORM])
def test_a_position_out_of_range_stops_the_kernel(driver, op, position):
    bad = [0, position, 1]
    case = norm_case(BAD, bad, BAD[0], 1.0) if op == NORM else Move(op, BAD, bad, BAD, (0, 0), {}).case()
    with pytest.raises(RuntimeError, match="emulation: trap"):
        driver("plain")([case])


def a_few_of_each():
    yield visit_case([1, 2, 0] * 50, [1, 0, 2] * 50, 3)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    for op in (GATHER, SCATTER, SCATTER_ADD):
        yield Move(op, x, [3, -1, 0, 5], x[:4], (0, 0), {}).case()
    yield Move(SCATTER, x, [3, 3, 3, 3], x[:4], (0, 0), {}).case()
    wide = torch.randn(3, 4 * (THREADS - 1), generator=torch.Generator().manual_seed(0))
    yield norm_case(wide, [2, -1, 0, 1, 1], wide[0], 1e-5)


def test_no_kernel_has_a_race(driver):
    driver("thread", FEW_BLOCKS)(list(a_few_of_each()))


BARRIERS = [  # the lines around each
    ("    __syncthreads();\n    int chunk_count", "    int chunk_count"),
    ("    __syncthreads();  // the next rows", "    // the next rows"),
    ("  __syncthreads();\n  x = 0;", "  x = 0;"),
    ("  __syncthreads();  // the next row ", "  // the next row "),
]
PLANTED = {
    "address": [
        ("fill_visits", ("j < tokens; j += ", "j <= tokens; j += "), "heap-buffer-overflow"),
        (
            "scan_visits",
            ("warp_counts[kWarps], warp_lengths", "warp_counts[kWarps - 1], warp_lengths"),
            "index 3 out of",
        ),
        ("alignment", ("{x.stride, y.stride, bytes}", "{x.stride, bytes}"), "misaligned address"),
    ],
    "thread": [(f"barrier {i}", edit, "data race") for i, edit in enumerate(BARRIERS)],
}


@pytest.mark.parametrize(
    ("build", "edit", "reported"),
    [pytest.param(build, *case, id=name) for build, cases in PLANTED.items() for name, *case in cases],
)
def test_a_planted_fault_is_reported(driver, build, edit, reported):
    """Or the sanitizers would prove nothing."""
    x = values(3, 12, torch.float32)
    cases = [*a_few_of_each(), Move(SCATTER, x, [1, 0], x[:2], (0, 1), {}).case()]
    with pytest.raises(RuntimeError, match=reported):
        driver(build, FEW_BLOCKS, edit)(cases)


def test_every_barrier_is_taken_away_once():
    assert (SOURCES / "rows.cu").read_text().count("__syncthreads();") == len(BARRIERS)
