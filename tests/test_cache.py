"""The routed cache under random use, against no cache at all.

The oracle keeps, for each row, the plain list of its real tokens and its path, and recomputes the logits of a row's new
tokens from scratch: one unpadded row, Hugging Face's own model in fp64 with the stack edited to the path, no cache.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from dataclasses import dataclass

import pytest
import torch
from families import LAYERS, prompts, tiny
from hypothesis import HealthCheck, assume, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from oracles import edited, padded
from transformers import DynamicCache

import drllm_fast.kv_slot
from drllm_fast.cache import RoutedCache
from drllm_fast.kv_slot import GROWTH, KVSlot
from drllm_fast.tables import Tables

# More examples: DRLLM_FAST_EXAMPLES=500 pytest tests/test_cache.py, which then also draws anew at each run.
EXAMPLES = os.environ.get("DRLLM_FAST_EXAMPLES")
WINDOW = 7
FAMILIES = {
    "llama": {},
    "mistral": {},  # a window of 7 in every layer
    "gemma2": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": None},  # in every other layer
}
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": contextlib.nullcontext}


# -- models, and what they are compared with --------------------------------------------------------------------------
@functools.cache
def dense(family):
    return tiny(family, **FAMILIES[family])


@functools.cache
def routed(family):
    return copy.deepcopy(dense(family)).enable_dynamic_routing([1] * LAYERS)


@functools.cache
def reference(family, path):
    model = edited(dense(family), path)
    model.set_attn_implementation("eager")
    return model.double()


@torch.no_grad()
def expected(family, path, tokens):
    """Logits [len(tokens), V] in fp64, from scratch."""
    return reference(family, tuple(path))(torch.tensor([tokens]), use_cache=False).logits[0]


@functools.cache
def tolerance(family):
    """Four times the largest error of Hugging Face's own fp32 forward against fp64 over 480 tokens and eight visits
    (1e-5 to 4e-5, at logits of 6). A routed forward rounds as often, in another order, and is looked at more often."""
    path = (2,) * LAYERS
    single = edited(dense(family), path)
    worst = 0.0
    for row in prompts([60] * 8):
        with torch.no_grad():
            logits = single(row[None], use_cache=False).logits[0]
        worst = max(worst, float((logits - expected(family, path, row.tolist())).abs().max()))
    return 4 * worst


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tolerance_tells_mistakes_apart(family):
    """One wrong token within reach, one token more or less, or one visit more or less: each is far outside."""
    (row,), path = prompts([6]), [1, 2, 0, 1]
    row = row.tolist()
    right = expected(family, path, row)[-1]
    others = [row[:3] + [row[3] % 95 + 2] + row[4:], row[1:], row[:1] + row]
    wrong = [expected(family, path, tokens)[-1] for tokens in others]
    wrong += [expected(family, other, row)[-1] for other in ([1, 1, 0, 1], [1, 2, 1, 1], [1, 2, 0, 2], [0, 2, 0, 1])]
    assert min(float((right - w).abs().max()) for w in wrong) > 100 * tolerance(family)


# -- the machine ------------------------------------------------------------------------------------------------------
@dataclass
class Branch:
    """A cache, and what must be in it: per row its path, and per column a token or None for padding."""

    cache: DynamicCache
    paths: list[tuple[int, ...]]
    columns: list[list[int | None]]
    recording: bool
    longest: list[int]  # tokens that each row has held at most, since its prefill

    def tokens(self, row):
        return [t for t in self.columns[row] if t is not None]

    def take(self, rows):
        self.paths = [self.paths[r] for r in rows]
        self.columns = [list(self.columns[r]) for r in rows]
        self.longest = [self.longest[r] for r in rows]


def is_empty(cache):
    """A cache fit for any prompt: a routed one without rows, or what the user gave, as it was."""
    if type(cache) is RoutedCache:
        return cache.batch_size == -1 and cache.plan is None and cache.kv_bytes(allocated=True) == cache.columns == 0
    return type(cache) is DynamicCache and not any(layer.is_initialized for layer in cache.layers)


class Broken(Exception):
    pass


@contextlib.contextmanager
def broken(model, layer, visit):
    """The model, failing in the middle of a layer: after attention has written its keys."""
    left = [visit]

    def hook(*_):
        left[0] -= 1
        if left[0] < 0:
            raise Broken

    handle = model.model.layers[layer].mlp.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def paths():
    return st.tuples(*[st.integers(0, 2)] * LAYERS)


def tokens(min_size, max_size):
    return st.lists(st.integers(2, 96), min_size=min_size, max_size=max_size)


class Machine(RuleBasedStateMachine):
    family: str

    def __init__(self):
        super().__init__()
        self.model, self.branches = routed(self.family), []
        self.growth, self.modes = drllm_fast.kv_slot.GROWTH, None

    def teardown(self):
        drllm_fast.kv_slot.GROWTH = self.growth

    # -- forwards
    def forward(self, branch, new, data, plan=None):
        """Run the new columns [B][S] and compare the logits of their real tokens."""
        mask = [[t is not None for t in row] for row in new]
        whole = [[t is not None for t in row] + m for row, m in zip(branch.columns, mask, strict=True)]
        plain = all(map(all, whole)) and data.draw(st.booleans(), "without a mask")
        ids = torch.tensor([[0 if t is None else t for t in row] for row in new])
        given = {
            "input_ids": ids,
            "attention_mask": None if plain else torch.tensor(whole).long(),
            "past_key_values": branch.cache,
        }
        going = [path for path, m in zip(branch.paths, mask, strict=True) if any(m)]
        visits = [(layer, v) for layer in range(LAYERS) for v in range(2) if any(path[layer] > v for path in going)]
        mode = MODES[data.draw(st.sampled_from(self.modes), "mode")]
        forced = contextlib.nullcontext() if plan is None else self.model.routing.using(plan)
        with mode(), forced:
            if visits and data.draw(st.integers(0, 3), "broken") == 0:
                with broken(self.model, *data.draw(st.sampled_from(visits), "breaks")), pytest.raises(Broken):
                    self.model(**given)
                if plan is not None:
                    assert is_empty(branch.cache)
                else:
                    self.what_the_cache_says()
            logits = self.model(**given).logits.detach()
        for row in range(len(new)):
            branch.columns[row] += new[row]
            n, held = sum(mask[row]), branch.tokens(row)
            branch.longest[row] = max(branch.longest[row], len(held))
            if n:
                right = expected(self.family, branch.paths[row], held)[-n:]
                error = (logits[row][torch.tensor(mask[row])] - right).abs().max()
                assert error <= tolerance(self.family), f"row {row}, path {branch.paths[row]}: off by {error}"

    @precondition(lambda self: not self.branches)
    @rule(
        data=st.data(),
        growth=st.sampled_from([0, 1, 4, 64]),
        modes=st.sampled_from([["no_grad"], ["inference"], ["no_grad", "inference"], list(MODES)]),
    )
    def start(self, data, growth, modes):
        drllm_fast.kv_slot.GROWTH, self.modes = growth, modes
        with_config = data.draw(st.booleans(), "with config")
        cache = DynamicCache(config=self.model.config) if with_config else DynamicCache()
        recording = with_config and data.draw(st.booleans(), "recording")
        if recording:
            cache.activate_past_recording()
        branch = Branch(cache, [], [], recording or not with_config, [])
        self.prefill(branch, data)
        self.branches = [branch]

    def prefill(self, branch, data):
        rows = data.draw(st.lists(tokens(1, 12), min_size=1, max_size=4), "prompts")
        branch.paths = data.draw(st.lists(paths(), min_size=len(rows), max_size=len(rows)), "paths")
        branch.columns, branch.longest = [[] for _ in rows], [0] * len(rows)
        width = max(map(len, rows)) + data.draw(st.integers(0, 1))
        side = data.draw(st.sampled_from(["left", "right", "apart"]))
        new = []
        for row in rows:
            gap = [None] * (width - len(row))
            at = {"left": 0, "right": len(row), "apart": len(row) // 2}[side]
            new.append(row[:at] + gap + row[at:])
        self.forward(branch, new, data, plan=branch.paths)

    def pick(self, data):
        return self.branches[data.draw(st.integers(0, len(self.branches) - 1), "branch")]

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), steps=st.integers(1, 4))
    def decode(self, data, steps):
        branch = self.pick(data)
        assume(branch.columns)
        for _ in range(steps):
            self.forward(branch, [[t] for t in data.draw(tokens(len(branch.paths), len(branch.paths)))], data)

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), size=st.integers(1, 9))
    def turn(self, data, size):
        """Several new tokens a row, padding anywhere among them, rows without any."""
        branch = self.pick(data)
        assume(branch.columns)
        token = st.integers(2, 96)
        row = st.just([None] * size) | st.lists(token | st.none(), min_size=size, max_size=size)
        row |= st.lists(token, min_size=size, max_size=size)
        self.forward(branch, [data.draw(row) for _ in branch.paths], data)

    @precondition(lambda self: any(not b.columns for b in self.branches))
    @rule(data=st.data())
    def prefill_again(self, data):
        self.prefill(next(b for b in self.branches if not b.columns), data)

    # -- rows
    @precondition(lambda self: self.branches)
    @rule(data=st.data())
    def reorder(self, data):
        branch = self.pick(data)
        rows = len(branch.paths)
        assume(rows)
        beams = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
        branch.cache.reorder_cache(torch.tensor(beams))
        branch.take(beams)

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), kind=st.sampled_from(["list", "tensor", "mask", "mask tensor", "negative"]))
    def select(self, data, kind):
        branch = self.pick(data)
        rows = len(branch.paths)
        assume(rows)
        if kind.startswith("mask"):
            kept = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows).filter(any))
            given, chosen = kept, [r for r in range(rows) if kept[r]]
        else:
            chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5))
            given = [r - rows for r in chosen] if kind == "negative" else chosen
        branch.cache.batch_select_indices(torch.tensor(given) if "tensor" in kind else given)
        branch.take(chosen)

    @precondition(lambda self: any(len(b.paths) in (1, 2, 3) for b in self.branches))
    @rule(data=st.data(), repeats=st.integers(1, 2))
    def repeat(self, data, repeats):
        branch = self.pick(data)
        assume(len(branch.paths) in (1, 2, 3))
        branch.cache.batch_repeat_interleave(repeats)
        branch.take([row for row in range(len(branch.paths)) for _ in range(repeats)])

    # -- time
    @precondition(lambda self: self.branches)
    @rule(data=st.data(), some=st.integers(0, 6))
    def crop(self, data, some):
        branch = self.pick(data)
        held = len(branch.columns[0]) if branch.columns else 0
        remove = min(held, some if some < 6 else data.draw(st.integers(0, held)))
        try:
            branch.cache.crop(-remove)
        except RuntimeError as error:  # a sliding window has dropped what would be needed; nothing has changed
            assert "already dropped" in str(error)
            assert self.family != "llama" and not branch.recording and max(branch.longest) >= WINDOW
            return
        branch.columns = [row[: held - remove] for row in branch.columns] if remove < held else []
        if not branch.columns:
            branch.paths, branch.longest = [], []

    @precondition(lambda self: self.branches)
    @rule(data=st.data(), really=st.integers(0, 2))
    def reset(self, data, really):
        assume(not really)
        branch = self.pick(data)
        branch.cache.reset()
        branch.paths, branch.columns, branch.longest = [], [], []

    @precondition(lambda self: len(self.branches) == 1 and self.branches[0].columns and "grad" not in self.modes)
    @rule()
    def fork(self):
        """A deep copy; both go on, each by itself."""
        (branch,) = self.branches
        cache = copy.deepcopy(branch.cache)
        self.branches.append(
            Branch(cache, list(branch.paths), [list(c) for c in branch.columns], branch.recording, list(branch.longest))
        )

    @precondition(lambda self: len(self.branches) == 2)
    @rule(which=st.integers(0, 1))
    def forget(self, which):
        del self.branches[which]

    # -- at all times
    @invariant()
    def what_the_cache_says(self):
        for branch in self.branches:
            check(self.family, self.model, branch)


def check(family, model, branch):
    cache, held = branch.cache, [len(branch.tokens(row)) for row in range(len(branch.paths))]
    assert type(cache) is RoutedCache
    columns = len(branch.columns[0]) if branch.columns else 0
    assert cache.lengths == held
    assert cache.columns == columns == cache.get_seq_length()
    assert cache.batch_size == (len(held) or -1)
    real = [[t is not None for t in row] for row in branch.columns]
    assert cache.real is None if all(map(all, real)) else cache.real.tolist() == real
    assert cache.plan is None if not held else cache.plan.tolist() == [list(p) for p in branch.paths]
    config = model.config
    size = 2 * config.num_key_value_heads * config.head_dim * 4  # bytes of one fp32 token in one slot
    least = most = 0
    for index, layer in enumerate(cache.layers):
        windowed = family == "mistral" or (family == "gemma2" and index % 2 == 0)
        for visit, slot in enumerate(layer.slots):
            rows = [row for row, path in enumerate(branch.paths) if path[index] > visit]
            assert (slot.keys is None) == (not rows), "a slot for no row, or none for a row"
            if slot.keys is None:
                continue
            assert slot.keys.shape == slot.values.shape
            assert len(slot.starts) == len(slot.room) == len(slot.first) == len(rows)
            ends = [max(n, held[row] - f) for row, n, f in zip(rows, slot.room, slot.first, strict=True)]
            ends = sorted((s, s + n) for s, n in zip(slot.starts, ends, strict=True))
            assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False)) and ends[-1][1] <= slot.keys.shape[2]
            for row, room, first in zip(rows, slot.room, slot.first, strict=True):
                assert 0 <= held[row] - first and (room == 0 or held[row] - first <= room)
                dropping = windowed and not branch.recording
                assert 0 <= first <= max(0, held[row] - WINDOW + 1) if dropping else first == 0
                least += min(held[row], WINDOW - 1) * size if dropping else held[row] * size
                most += held[row] * size
    assert least <= cache.kv_bytes() <= min(most, cache.kv_bytes(allocated=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_sequence_of_uses(family):
    machine = type("Machine", (Machine,), {"family": family})
    if EXAMPLES is None:
        seed(list(FAMILIES).index(family))(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            deadline=None,
            derandomize=EXAMPLES is None,
            database=None,
            report_multiple_bugs=False,
            max_examples=int(EXAMPLES or 100),
            stateful_step_count=15,
            suppress_health_check=list(HealthCheck),
        ),
    )


# -- what the machine would meet too seldom, or cannot see ------------------------------------------------------------
A, B = prompts([5, 9])
PATHS = [[1, 2, 0, 1], [0, 1, 0, 2]]


def filled(model, rows=(A, B), plan=PATHS, cache=None):
    """A cache with the rows in it, left-padded."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad(), model.routing.using(plan[: len(rows)]):
        model(**padded(rows), past_key_values=cache)
    return cache


def slots(cache):
    return [slot for layer in cache.layers for slot in layer.slots if slot.keys is not None]


def state(cache):
    """Everything a refused call must leave alone."""
    held = [(s.starts, s.room, s.first, s.keys.data_ptr(), s.keys.shape) for s in slots(cache)]
    real = None if cache.real is None else cache.real.tolist()
    return copy.deepcopy((held, cache.lengths, cache.columns, real, cache.plan.tolist()))


def test_a_cache_cropped_to_nothing_takes_a_new_prompt_on_new_paths():
    model, plan = routed("llama"), [[2, 0, 1, 1], [1, 1, 2, 0]]
    cache = filled(model)
    cache.crop(-9)
    assert is_empty(cache)
    with torch.no_grad(), model.routing.using(plan):
        logits = model(torch.stack([A, A]), past_key_values=cache).logits
    for row, path in enumerate(plan):
        assert (logits[row] - expected("llama", path, A.tolist())).abs().max() <= tolerance("llama")


@pytest.mark.parametrize("how", ["select", "crop"])
def test_rows_without_padding_need_no_mask(how):
    model = routed("llama")
    if how == "select":
        cache, row = filled(model), B
        cache.batch_select_indices([1])
    else:  # the padding was among the columns that go
        cache, row = filled(model, [A]), A
        with torch.no_grad():
            model(torch.tensor([[3, 0]]), attention_mask=torch.tensor([[1] * 6 + [0]]), past_key_values=cache)
        cache.crop(-2)
    assert cache.real is None
    path = cache.plan[0].tolist()
    with torch.no_grad():
        logits = model(torch.tensor([[5]]), past_key_values=cache).logits[0, -1]
    assert (logits - expected("llama", path, [*row.tolist(), 5])[-1]).abs().max() <= tolerance("llama")


def test_no_new_token_in_any_row():
    model = routed("llama")
    cache = filled(model, [B])
    with torch.no_grad():
        logits = model(A[None, :2], attention_mask=torch.tensor([[1] * 9 + [0] * 2]), past_key_values=cache).logits
    assert logits.shape[:2] == (1, 2) and cache.lengths == [9] and cache.columns == 11


@pytest.mark.parametrize("nothing", [[], torch.tensor([], dtype=torch.long), [False, False], torch.zeros(2).bool()])
def test_selecting_no_row_empties_the_cache(nothing):
    model = routed("llama")
    cache = filled(model)
    cache.batch_select_indices(nothing)
    assert is_empty(cache)
    assert filled(model, cache=cache).lengths == [5, 9]


def test_what_is_refused_changes_nothing():
    model = routed("mistral")
    cache = filled(model)
    before = state(cache)
    for rows in ([0, 2], [-3], torch.tensor([5]), [True, False, True]):
        with pytest.raises(IndexError):
            cache.batch_select_indices(rows)
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="at least 1"):
        cache.batch_repeat_interleave(0)
    with pytest.raises(ValueError, match="use crop"):
        cache.crop(1)
    with pytest.raises(ValueError, match="cannot remove 10 tokens from a cache of 9"):
        cache.crop(-10)
    with pytest.raises(ValueError, match="padded"), torch.no_grad():
        model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match="routed model"):
        cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    with pytest.raises(NotImplementedError, match="ask the cache"):
        cache.layers[0].get_seq_length()
    with pytest.raises(NotImplementedError, match="iterate"):
        list(cache)
    assert state(cache) == before


def test_an_empty_cache_may_be_asked_and_changed():
    cache = RoutedCache(dense("gemma2").config)
    cache.crop(0)
    cache.reset()
    cache.reorder_cache(torch.tensor([0, 1]))
    cache.batch_select_indices([0])
    cache.batch_repeat_interleave(2)
    assert is_empty(cache) and cache.get_seq_length() == 0
    assert cache.bytes_per_token() == [0] * LAYERS and cache.is_sliding == [True, False] * 2
    assert filled(routed("gemma2"), cache=cache).columns == 9


# -- memory -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(dtype):
    """Skipped layers hold nothing, repeated ones twice: here 5 tokens in 4 visits and 9 tokens in 3."""
    model = tiny("llama", dtype=dtype).enable_dynamic_routing([1] * LAYERS)
    cache = filled(model)
    size = 2 * 2 * 8 * torch.finfo(dtype).bits // 8
    assert cache.bytes_per_token() == [size] * LAYERS  # layer 2, which nobody ran, is taken to be like the others
    assert cache.kv_bytes() == cache.kv_bytes(allocated=True) == (5 * 4 + 9 * 3) * size
    assert cache.layers[2].slots[0].keys is None


def test_a_sliding_window_keeps_the_end_of_a_long_prompt():
    model, (row,) = routed("gemma2"), prompts([200])
    cache = filled(model, [row], [[1, 1, 0, 2]])
    assert [slot.keys.shape[2] for slot in slots(cache)] == [WINDOW - 1 + GROWTH, 200, 200, 200]
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)
    cache = filled(model, [A, row], [[1, 0, 0, 0]] * 2)  # a short row beside it
    assert slots(cache)[0].keys.shape[2] == len(A) + WINDOW - 1 + 2 * GROWTH and slots(cache)[0].first == [0, 194]
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    filled(model, [row], [[1, 1, 0, 2]], cache)
    assert [slot.keys.shape[2] for slot in slots(cache)] == [200] * 4
    cache.crop(-150)
    assert cache.lengths == [50]


@pytest.mark.parametrize(("window", "steps", "copies"), [(None, 4000, 28), (7, 1000, 17)])
def test_a_slot_is_seldom_copied(window, steps, copies):
    """A copy every 64 steps, or once a row is an eighth longer: 9 up to 512 tokens, and log(4000 / 512, 1.125) = 18."""
    keep, seen = None if window is None else window - 1, []
    slot, k = KVSlot(), torch.ones(1, 1, 3, 2)
    with torch.inference_mode():
        for position in range(steps):
            slot.write(k * position, k * -position, [position] * 3, [1] * 3, keep, Tables())
            if not seen or seen[-1] is not slot.keys:
                seen.append(slot.keys)
    assert len(seen) <= copies
    for start, first in zip(slot.starts, slot.first, strict=True):
        assert first == 0 if window is None else steps - window - GROWTH <= first <= steps - window
        held = list(range(first, steps))
        assert slot.keys[0, 0, start : start + len(held), 0].tolist() == held
        assert slot.values[0, 0, start : start + len(held), 0].tolist() == [-p for p in held]


def test_a_fused_projection_is_not_kept_alive():
    cache = filled(tiny("phi3").enable_dynamic_routing([1] * LAYERS))
    for slot in slots(cache):
        for t in (slot.keys, slot.values):
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


def test_rows_that_stay_where_they_are_are_not_copied():
    cache = filled(routed("llama"), [A, A, B], [[1, 1, 1, 1], [0, 1, 1, 1], [2, 0, 1, 1]])
    before = [[s.keys for s in layer.slots] for layer in cache.layers]
    cache.reorder_cache(torch.tensor([0, 1, 2]))
    cache.batch_select_indices([0, 2])
    after = [[s.keys for s in layer.slots] for layer in cache.layers]
    assert after[0][0] is before[0][0] and after[0][1] is before[0][1]  # the row that went had not run layer 0
    assert after[2][0] is not before[2][0]


# -- other people's tensors -------------------------------------------------------------------------------------------
def test_a_copy_shares_the_policy_and_nothing_that_changes():
    class Policy:
        def route(self, layer, prompts):
            return torch.ones(prompts.cu_seqlens.numel() - 1, dtype=torch.int8)

        def __deepcopy__(self, memo):
            raise AssertionError("a policy may hold the routers of a whole model")

    policy = Policy()
    model = tiny("llama").enable_dynamic_routing(policy)
    cache = DynamicCache()
    with torch.no_grad():
        model(B[None], past_key_values=cache)
    before = state(cache)
    twin = copy.deepcopy(cache)
    assert type(twin) is RoutedCache and twin.decided_by is policy and twin.model() is cache.model()
    assert not {s.keys.data_ptr() for s in slots(cache)} & {s.keys.data_ptr() for s in slots(twin)}
    twin.batch_repeat_interleave(2)
    twin.crop(-3)
    assert state(cache) == before and twin.lengths == [6, 6]


def test_the_plan_that_is_shown_is_a_copy():
    model = routed("llama")
    cache = filled(model)
    model.routing.plan.zero_()
    assert cache.plan.tolist() == PATHS and model.routing.plan.tolist() == PATHS


def test_what_a_hook_has_seen_is_not_written_to():
    """The keys of a prompt are the model's own tensors; after a crop, new ones must not go there."""
    model, seen = routed("llama"), []
    projections = [m for name, m in model.named_modules() if name.endswith(("k_proj", "v_proj"))]
    hooks = [m.register_forward_hook(lambda *a: seen.append((a[2], a[2].clone()))) for m in projections]
    cache = filled(model, [B], [[1, 2, 1, 1]])
    cache.crop(-4)
    with torch.no_grad():
        model(A[None, :3], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * 2 * 5 and all(torch.equal(a, b) for a, b in seen)


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "embed_tokens", "lm_head"])
def test_gradients_through_several_forwards(trained):
    """Whatever is trained, autograd finds the keys of earlier forwards as they were."""
    path, steps = [1, 2, 0, 1], B.split([5, 1, 1, 2])
    ours = copy.deepcopy(dense("llama"))
    theirs = edited(ours, path)
    gradients = []
    for model in (ours.enable_dynamic_routing(path), theirs):
        for name, p in model.named_parameters():
            p.requires_grad_(trained in name)
        cache, loss = DynamicCache(), 0
        for step in steps:
            loss = loss + model(step[None], past_key_values=cache).logits.logsumexp(-1).sum()
        loss.backward()
        gradients.append([p.grad for name, p in model.named_parameters() if p.requires_grad])
    here, there = gradients
    if trained.endswith("_proj"):  # the edited stack has copies: layer 1 twice, layer 2 not at all
        assert here[2] is None
        here, there = [here[0], here[1], here[3]], [there[0], there[1] + there[2], there[3]]
    for a, b in zip(here, there, strict=True):
        assert b.abs().max() > 1e-2
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_cache_filled_in_inference_mode_serves_outside_of_it():
    model, cache = routed("llama"), DynamicCache()
    with torch.inference_mode(), model.routing.using(PATHS[0]):
        model(A[None], past_key_values=cache)
    assert slots(cache)[0].keys.is_inference()
    for one, mode in ((copy.deepcopy(cache), contextlib.nullcontext), (cache, torch.no_grad)):
        with mode():
            logits = model(B[None, :2], past_key_values=one).logits[0].detach()
        right = expected("llama", PATHS[0], [*A.tolist(), *B[:2].tolist()])[-2:]
        assert (logits - right).abs().max() <= tolerance("llama")
