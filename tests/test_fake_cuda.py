"""A routed model on a fake GPU: it computes what it computes on the CPU, nothing lies on the wrong device, and what
crosses between host and device is counted.

Per forward of the base model, whatever the number of layers and rows (waits are copies that wait for the device):

                                      reads                      uploads   waits
    prompt, given plan                0                          2         0
    prompt, LayerRouters              1 a layer: its decisions   L + 1     0
    decode, second turn               0                          1         0
    any of them with attention_mask   1 more: the mask           same      0
    reorder_cache, batch_select       1: a tensor of indices     1         0
    batch_repeat_interleave, crop     0                          1, 0      0
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from fake_cuda import CPU, CUDA, fake_cuda, on_cuda
from families import LAYERS, prompts, tiny
from generation_cases import Letters
from oracles import padded

import drllm_fast.kv_slot
from drllm_fast import LayerRouters, Sampling, generate
from drllm_fast.generation import Engine

PLAN = [[0, 1, 2, 1], [1, 1, 0, 2], [2, 0, 1, 1]]
ATTENTION = "drllm_fast.ragged_attention.default"


@pytest.fixture
def device():
    with fake_cuda() as device, torch.no_grad():
        yield device


class Pair:
    """The same routed model on the CPU and on the fake GPU, each with a cache of its own."""

    def __init__(self, device, policy=PLAN, family="llama", cached=True, **changes):
        self.device = device
        self.cpu = tiny(family, **changes)
        self.gpu = device.move(copy.deepcopy(self.cpu))
        self.cpu.enable_dynamic_routing(copy.deepcopy(policy))
        self.gpu.enable_dynamic_routing(policy)
        self.cached, self.caches = cached, (None, None)

    def __call__(self, ids, **kwargs):
        """Run both, compare; what crossed on the GPU: reads, uploads, waits."""
        there = {k: self.device.of(v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        past, past_there = self.caches
        want = self.cpu(ids, past_key_values=past, use_cache=self.cached, **kwargs)
        ids_there = self.device.of(ids)
        self.device.clear()
        got = self.gpu(ids_there, past_key_values=past_there, use_cache=self.cached, **there)
        crossed = self.crossed()
        assert on_cuda(got.logits)
        torch.testing.assert_close(got.logits.held, want.logits)
        assert torch.equal(self.gpu.routing.plan, self.cpu.routing.plan)
        self.caches = (want.past_key_values, got.past_key_values) if self.cached else self.caches
        return crossed

    def change(self, name, *args):
        """A method of both caches; what crossed."""
        past, past_there = self.caches
        getattr(past, name)(*args)
        args = [self.device.of(a) if isinstance(a, torch.Tensor) else a for a in args]
        self.device.clear()
        getattr(past_there, name)(*args)
        return self.crossed()

    def crossed(self):
        return len(self.device.reads), len(self.device.uploads), len(self.device.waits)


def ids_of(rows, columns, seed=1):
    return torch.stack(prompts([columns] * rows, seed=seed))


def left_padded(lengths=(4, 9, 6)):
    given = padded(prompts(lengths))
    return given["input_ids"], given["attention_mask"]


def more(mask, columns=1):
    return torch.cat([mask, mask.new_ones(len(mask), columns)], dim=1)


READS = {
    "item": lambda t: t[0].item(), "int": lambda t: int(t[0]), "bool": lambda t: bool(t[0] > 0),
    "if": lambda t: 1 if (t > 0).all() else 0, "tolist": lambda t: t.tolist(), "cpu": lambda t: t.cpu(),
    "copy_": lambda t: torch.zeros(3, dtype=torch.int64).copy_(t), "nonzero": lambda t: t.nonzero(),
    "where": lambda t: torch.where(t > 0), "bool mask": lambda t: t[t > 1], "unique": lambda t: t.unique(),
    "repeat_interleave": lambda t: t.repeat_interleave(t), "masked_select": lambda t: t.masked_select(t > 1),
    "equal": lambda t: torch.equal(t, t),
}  # fmt: skip


@pytest.mark.parametrize("how", READS)
def test_what_counts_as_a_read(device, how):
    t = device.of(torch.tensor([1, 2, 3]))
    READS[how](t)
    assert (len(device.reads), device.uploads, device.waits) == (1, [], [])


def test_what_counts_as_an_upload_and_as_a_wait(device):
    t = torch.tensor([1, 2, 0])
    there = t.to(CUDA, non_blocking=True)
    assert len(device.uploads) == 1 and there.tolist() == [1, 2, 0]
    there.copy_(t, non_blocking=True)
    assert len(device.uploads) == 2 and not device.waits
    t.to(CUDA), torch.tensor([1, 2], device=CUDA), torch.tensor(1, device=CUDA), there.copy_(t), there[[0, 1]]
    assert len(device.waits) == 5
    device.clear()
    there[1:], there[None, ..., 0], there[there], there + 1, torch.zeros(3, device=CUDA), there.fill_(2)
    assert not device.reads + device.uploads + device.waits


MIXED = {
    "add": lambda t, there: t + there, "index_select": lambda t, there: there.index_select(0, t),
    "index": lambda t, there: there[t], "index of a tensor on the CPU": lambda t, there: t[there],
    "index_copy_": lambda t, there: there.index_copy_(0, t, there), "cat": lambda t, there: torch.cat([t, there]),
}  # fmt: skip


@pytest.mark.parametrize("how", MIXED)
def test_operands_on_two_devices_are_refused(device, how):
    t = torch.tensor([1, 2, 0])
    with pytest.raises(RuntimeError, match="cpu.*cuda"):
        MIXED[how](t, device.of(t))


@pytest.mark.parametrize("cached", [False, True])
def test_a_prompt_is_run_without_reading(device, cached):
    pair = Pair(device, cached=cached)
    assert pair(ids_of(3, 6)) == (0, 2, 0)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_prompt_costs_one_read_of_its_mask(device, side, cached):
    given = padded(prompts([4, 9, 6]), side)
    pair = Pair(device, cached=cached)
    assert pair(given["input_ids"], attention_mask=given["attention_mask"]) == (1, 2, 0)
    assert device.reads == ["aten._to_copy.default"]


def test_a_mask_of_ones_costs_one_read(device):
    pair, ids = Pair(device), ids_of(3, 5)
    mask = torch.ones_like(ids)
    assert pair(ids, attention_mask=mask) == (1, 2, 0)
    assert pair(ids_of(3, 1), attention_mask=more(mask)) == (1, 1, 0)


def test_a_mask_on_the_cpu_costs_no_read(device):
    pair = Pair(device, cached=False)
    ids, mask = left_padded()
    embeds = pair.cpu.get_input_embeddings()(ids)
    there = device.of(embeds)
    device.clear()
    got = pair.gpu(inputs_embeds=there, attention_mask=mask, use_cache=False)
    assert pair.crossed() == (0, 2, 0)
    torch.testing.assert_close(got.logits.held, pair.cpu(ids, attention_mask=mask, use_cache=False).logits)


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_decoding_reads_nothing_while_slots_grow(device, mode, monkeypatch):
    monkeypatch.setattr(drllm_fast.kv_slot, "GROWTH", 2)
    with mode():
        pair = Pair(device)
        pair(ids_of(3, 5))
        slots = set()
        for step in range(7):
            assert pair(ids_of(3, 1, seed=step)) == (0, 1, 0)
            slots.add(pair.caches[1].layers[1].slots[0].keys.shape[2])
    assert len(slots) == 3  # of room 3, three times
    assert all(on_cuda(s.keys) for layer in pair.caches[1].layers for s in layer.slots if s.keys is not None)


def test_one_row_needs_no_more_than_its_positions_and_lengths(device):
    pair = Pair(device, [1, 0, 2, 1])
    pair(ids_of(1, 5))
    assert pair(ids_of(1, 1)) == (0, 1, 0)


@pytest.mark.parametrize("layers", [2, 11])
def test_uploads_do_not_grow_with_the_layers(device, layers):
    generator = torch.Generator().manual_seed(layers)
    plan = torch.randint(0, 3, (5, layers), generator=generator)
    pair = Pair(device, plan, num_hidden_layers=layers)
    ids, mask = left_padded((3, 7, 5, 2, 4))
    assert pair(ids, attention_mask=mask) == (1, 2, 0)
    for seed in range(2):
        mask = more(mask)
        assert pair(ids_of(5, 1, seed), attention_mask=mask) == (1, 1, 0)


def test_a_second_turn_of_several_tokens(device):
    pair = Pair(device)
    pair(ids_of(3, 6))
    pair(ids_of(3, 1))
    assert pair(ids_of(3, 5, seed=3)) == (0, 1, 0)
    assert pair(ids_of(3, 1)) == (0, 1, 0)


def test_a_padded_second_turn_and_a_row_that_brings_nothing(device):
    pair = Pair(device)
    ids, mask = left_padded()
    pair(ids, attention_mask=mask)
    turn, new = left_padded((3, 5, 2))
    mask = torch.cat([mask, new], dim=1)
    assert pair(turn, attention_mask=mask) == (1, 1, 0)
    mask = torch.cat([mask, torch.tensor([[1], [0], [1]])], dim=1)
    assert pair(ids_of(3, 1), attention_mask=mask) == (1, 1, 0)


def test_layers_call_the_op_once_a_visit_and_loop_over_no_rows(device):
    pair, visits = Pair(device), 2 * LAYERS - 1  # no row repeats the second layer
    ids, mask = left_padded()
    for turn in range(3):
        pair(ids if turn == 0 else ids_of(3, 1), attention_mask=mask)
        mask = more(mask)
        assert device.ops.count(ATTENTION) == visits
        assert not [op for op in device.ops if "scaled_dot_product" in op or "softmax" in op or "baddbmm" in op]


def test_the_cache_is_changed_with_one_copy(device):
    pair = Pair(device)
    ids, mask = left_padded()
    pair(ids, attention_mask=mask)
    pair(ids_of(3, 1), attention_mask=(mask := more(mask)))
    order = torch.tensor([2, 0, 2])
    assert pair.change("reorder_cache", order) == (1, 1, 0)
    mask = more(mask[order])
    assert pair(ids_of(3, 1), attention_mask=mask) == (1, 1, 0)
    assert pair.change("batch_repeat_interleave", 2) == (0, 1, 0)
    mask = more(mask.repeat_interleave(2, dim=0))
    assert pair(ids_of(6, 1), attention_mask=mask) == (1, 1, 0)
    assert pair.change("crop", -2) == (0, 0, 0)
    assert pair.change("batch_select_indices", [0, 2, 3]) == (0, 1, 0)
    assert pair.change("batch_select_indices", torch.tensor([True, True, False])) == (1, 1, 0)
    mask = more(mask[[0, 2], :-2])
    assert pair(ids_of(2, 1), attention_mask=mask) == (1, 1, 0)
    assert pair.caches[1].plan.device == CPU


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_sliding_windows(device, family, monkeypatch):
    monkeypatch.setattr(drllm_fast.kv_slot, "GROWTH", 3)
    pair = Pair(device, family=family)
    ids, mask = left_padded((6, 20, 13))  # of a window of 7; the longest prompt is not kept whole
    assert pair(ids, attention_mask=mask) == (1, 2, 0)
    for step in range(5):
        mask = more(mask)
        assert pair(ids_of(3, 1, seed=step), attention_mask=mask) == (1, 1, 0)
    assert not [op for op in device.ops if "scaled_dot_product" in op]
    mask = more(mask, 9)
    assert pair(ids_of(3, 9), attention_mask=mask) == (1, 1, 0)


@pytest.mark.parametrize("knob", [-0.5, -0.4])
def test_routers_are_read_once_a_layer_and_nothing_else_is(device, knob):
    def policy():
        routers = LayerRouters(num_layers=LAYERS, hidden_size=32, router_size=8, windows=3)
        with torch.no_grad():
            routers.w2.mul_(20)
        routers.knob = knob
        return routers

    pair = Pair(device, policy())
    ids, mask = left_padded((4, 9, 6, 7, 5))
    pair(ids, attention_mask=mask)  # the routers move to the device
    pair.caches = (None, None)
    reads, uploads, waits = pair(ids, attention_mask=mask)
    plan = pair.gpu.routing.plan
    assert len(plan.unique(dim=0)) > 1 and len(plan.unique()) > 1
    assert (reads, waits) == (LAYERS + 1, 0) and uploads <= LAYERS + 1
    assert pair(ids_of(5, 1), attention_mask=more(mask)) == (1, 1, 0)


def test_a_context_and_positions_of_the_caller(device):
    pair, ids = Pair(device), ids_of(3, 6)
    with pair.gpu.routing.context([2, 3, 4]), pair.cpu.routing.context([2, 3, 4]):
        assert pair(ids) == (0, 2, 0)
    pair.caches = (None, None)
    ids, mask = left_padded()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert pair(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True) == (1, 2, 0)


def test_disabled_crosses_as_often_as_the_dense_model(device):
    ids, mask = left_padded()
    dense = device.move(tiny("llama"))
    pair = Pair(device, cached=False)
    given = {"input_ids": device.of(ids), "attention_mask": device.of(mask)}
    device.clear()
    dense(**given)
    expected = pair.crossed()
    with pair.gpu.routing.disabled(), pair.cpu.routing.disabled():
        device.clear()
        got = pair.gpu(**given).logits
        assert pair.crossed() == expected
        torch.testing.assert_close(got.held, pair.cpu(ids, attention_mask=mask).logits)
    assert ATTENTION not in device.ops


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_reads_the_mask_and_what_the_dense_model_reads(device, beams):
    ids, mask = left_padded()
    pair = Pair(device)
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    reads = []
    for dense in (True, False):
        with pair.gpu.routing.disabled() if dense else nullcontext():
            device.clear()
            got = pair.gpu.generate(device.of(ids), attention_mask=device.of(mask), **given)
            reads.append(len(device.reads))
    assert torch.equal(got.held, pair.cpu.generate(ids, attention_mask=mask, **given))
    assert reads[1] == reads[0] + 4 * beams  # forwards, and with beams as many reorders


def test_an_engine_waits_once_a_step(device):
    """For the tokens that were chosen. Uploads: what reading prompts needs, and the tables of changed batches."""
    cpu = tiny("llama")
    gpu = device.move(copy.deepcopy(cpu))
    rows = [row.tolist() for row in prompts([5, 9, 3])]
    options = {
        "sampling": [Sampling(n, ignore_eos=True) for n in (8, 5, 8)],
        "paths": PLAN,
        "lookahead": 0,
        "max_batch": 3,
    }
    want = [result.tokens for result in generate(cpu, Letters(), rows, **options)]
    crossed = []
    with Engine(gpu, Letters(), max_batch=3, lookahead=0, kv_tokens=900, graphs=False) as engine:
        requests = [
            engine.submit(row, sampling, path=path)
            for row, sampling, path in zip(rows, options["sampling"], PLAN, strict=True)
        ]
        while engine.busy:
            device.clear()
            engine.step()
            crossed.append((len(device.reads), len(device.uploads), len(device.waits)))
    assert [request.tokens for request in requests] == want
    reading, first, *steps = crossed
    assert reading == (1, 5, 0) and first[0] == 1 and first[2] == 0
    assert steps[:2] == [(1, 0, 0)] * 2 and steps[4:] == [(1, 0, 0)] * 2  # between them a row leaves
    assert steps[3][0] == 1 and steps[3][2] == 0 and steps[3][1] <= first[1]
