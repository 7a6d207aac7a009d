"""Stored windows against hooks on Hugging Face's own model with an edited stack, one prompt at a time."""

import json

import pytest
import torch
import torch.nn.functional as F
from families import LAYERS, prompts, tiny
from oracles import edited

from drllm_fast.packed import PackedBatch
from drllm_fast.paths import prompt_batches, route_paths, routed_by
from drllm_fast.policies import PromptBatch
from drllm_fast.router_reference import pool_windows
from drllm_fast.routers import LayerRouters
from drllm_fast.training import windows as module
from drllm_fast.training.windows import pool, pool_examples

LENGTHS = [9, 1, 17, 8, 3, 24, 12, 7]
PATHS = [(1, 1, 1, 1), (0, 1, 2, 1), (1, 0, 0, 1), (2, 2, 1, 0), (0, 0, 0, 0), (1, 2, 0, 2), (2, 1, 1, 1), (1, 1, 0, 1)]
TEXTS = [prompt.tolist() for prompt in prompts(LENGTHS)]


@torch.no_grad()
def expected(model, prompt, path, windows):
    """[L, W, d]: what enters each block, by hooks; a block that is skipped would read what the next one reads."""
    alone, entering = edited(model, path), []

    def note(block, args, kwargs):
        entering.append((args or tuple(kwargs.values()))[0][0])

    for block in (*alone.model.layers, alone.model.norm):
        block.register_forward_pre_hook(note, with_kwargs=True)
    alone.model(input_ids=torch.tensor([prompt]), use_cache=False)
    assert len(entering) == sum(path) + 1
    out = torch.zeros(len(path), windows, entering[0].shape[1])
    for layer in range(len(path)):
        hidden = entering[sum(path[:layer])].float()
        used = min(windows, len(prompt))
        size = len(prompt) // used
        for w in range(used):
            out[layer, w] = sum(hidden[t] for t in range(w * size, (w + 1) * size)) / size
    return out


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_windows_are_those_of_an_edited_stack(family):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = pool_examples(model, TEXTS, torch.tensor(PATHS), windows=8, max_tokens=40, progress=False)
    assert found.pooled.dtype == torch.float32 and found.pooled.shape == (LAYERS, len(TEXTS), 8, 32)
    assert found.counts.tolist() == [8, 1, 8, 8, 3, 8, 8, 7] and found.counts.dtype == torch.int64
    for n, (prompt, path) in enumerate(zip(TEXTS, PATHS, strict=True)):
        close(found.pooled[:, n], expected(model, prompt, path, 8))
    assert not hasattr(model.get_decoder(), "_drllm_routing")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_batching_does_not_matter():
    model = tiny("llama")
    together = pool_examples(model, TEXTS, PATHS, windows=5, progress=False)
    for max_tokens in (1, 20, 50):
        other = pool_examples(model, TEXTS, PATHS, windows=5, max_tokens=max_tokens, progress=False)
        close(other.pooled, together.pooled, 1e-5)
        assert torch.equal(other.counts, together.counts)
    order = [3, 0, 7, 5, 1, 2, 6, 4]
    turned = pool_examples(model, [TEXTS[i] for i in order], [PATHS[i] for i in order], windows=5, progress=False)
    close(turned.pooled, together.pooled[:, order], 1e-5)


def test_the_labels_hold_whatever_else_is_asked_of_the_model():
    model = tiny("llama")
    plain = pool_examples(model, TEXTS, PATHS, progress=False)
    model.enable_dynamic_routing([0, 1, 1, 1]).train()
    policy = model.routing.policy
    with model.routing.using([1, 1, 0, 0]), model.routing.context([1] * 8):
        again = pool_examples(model, TEXTS, PATHS, progress=False)
        assert route_paths(model, TEXTS, torch.tensor([PATHS[3]] * 8)).tolist() == [list(PATHS[3])] * 8
    with model.routing.disabled():
        close(pool_examples(model, TEXTS, PATHS, progress=False).pooled, plain.pooled)
    close(again.pooled, plain.pooled)
    assert model.routing.policy is policy and model.routing.last is None and model.training


@pytest.mark.parametrize("windows", [1, 3, 8, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_is_the_reference(windows, dtype):
    generator = torch.Generator().manual_seed(windows)
    for lengths in ([1], [7, 8, 9, 0, 16], [30, 2, 5, 29, 31, 61], [0, 3, 0], []):
        hidden = (torch.randn(sum(lengths), 6, generator=generator) * 10 + 3).to(dtype)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        reference, _ = pool_windows(hidden, ends, windows)
        close(pool(hidden, ends, windows), reference, 1e-6)


def test_a_model_that_trains_drops_nothing_out():
    model = tiny("phi3", resid_pdrop=0.5)
    expected = pool_examples(model, TEXTS, PATHS, progress=False)
    model.train()
    close(pool_examples(model, TEXTS, PATHS, progress=False).pooled, expected.pooled)
    assert model.training and model.model.layers[0].resid_mlp_dropout.training


def test_dtypes():
    model = tiny("llama", dtype=torch.bfloat16)
    wide = pool_examples(model, TEXTS, PATHS, progress=False).pooled
    assert wide.dtype == torch.float32 and not torch.equal(wide, wide.bfloat16().float())
    narrow = pool_examples(model, TEXTS, PATHS, dtype=torch.bfloat16, progress=False).pooled
    assert torch.equal(narrow, wide.bfloat16())


# -- training on them
def test_training_on_stored_windows_is_training_through_the_model():
    """The same optimiser steps, in fp32: in each, the frozen model runs the labels and the routers read its states; or
    the routers read the stored windows."""
    model, plans, size = tiny("llama"), torch.tensor(PATHS, dtype=torch.int8), 3

    class InGraph:
        """Runs the labels, and collects the logits of the routers, to be trained."""

        def route(self, layer, prompts):
            with torch.inference_mode(False), torch.enable_grad():
                copy = PromptBatch(prompts.hidden.clone(), prompts.cu_seqlens.clone())
                self.logits.append(self.routers.logits(layer, copy))
            return plans[self.rows, layer]

    def through_the_model(routers, rows):
        policy = InGraph()
        policy.routers, policy.rows, policy.logits = routers, rows, []
        [(group, batch)] = prompt_batches([TEXTS[i] for i in rows], 8192)
        policy.rows = [rows[i] for i in group]
        with routed_by(model, policy), torch.no_grad():
            model.model(**batch, use_cache=False)
        back = torch.tensor(group).argsort()
        return torch.stack(policy.logits)[:, back]

    stored = pool_examples(model, TEXTS, plans, windows=4, progress=False)

    def on_windows(routers, rows):
        from drllm_fast.ops import router_windows

        weights = (routers.w1, routers.b1, routers.w2, routers.b2)
        return router_windows(stored.pooled[:, rows], stored.counts[rows], *weights)

    def train(forward):
        routers = LayerRouters.for_model(model, router_size=16, windows=4, generator=torch.Generator().manual_seed(3))
        optimiser = torch.optim.AdamW(routers.parameters(), lr=1e-2)
        losses = []
        for epoch in range(4):
            order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(epoch)).tolist()
            for at in range(0, len(order), size):
                rows = order[at : at + size]
                loss = F.cross_entropy(forward(routers, rows).flatten(0, 1), plans[rows].long().T.flatten())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(float(loss.detach()))
        return torch.tensor(losses), torch.cat([p.detach().flatten() for p in routers.parameters()])

    (losses, weights), (own_losses, own_weights) = train(through_the_model), train(on_windows)
    assert losses[-1] < 0.7 * losses[0]
    close(own_losses, losses)
    close(own_weights, weights)


# -- files
class Killed(Exception):
    pass


def stopped_after(monkeypatch, model, groups):
    """From now on the model stops in the forward after so many."""
    left, forward = [groups], PackedBatch.__init__

    def counted(self, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        forward(self, *args, **kwargs)

    monkeypatch.setattr(PackedBatch, "__init__", counted)
    return left


def test_a_stopped_pass_goes_on(tmp_path, monkeypatch):
    model, file = tiny("llama"), tmp_path / "w.bin"
    memory = pool_examples(model, TEXTS, PATHS, progress=False)
    with monkeypatch.context() as patch:
        stopped_after(patch, model, 2)
        with pytest.raises(Killed):
            pool_examples(model, TEXTS, PATHS, max_tokens=25, file=file, progress=False)
    done = json.loads((tmp_path / "w.bin.json").read_text())["done"]
    assert 0 < len(done) < len(TEXTS) and max(len(TEXTS[i]) for i in done) == 24
    with monkeypatch.context() as patch:
        left = stopped_after(patch, model, 100)
        first = pool_examples(model, TEXTS, PATHS, max_tokens=1, file=file, progress=False)
        assert left[0] == 100 - (len(TEXTS) - len(done))
        close(first.pooled, memory.pooled)
        again = pool_examples(model, TEXTS, PATHS, file=file, progress=False)
        assert left[0] == 100 - (len(TEXTS) - len(done)) and torch.equal(again.pooled, first.pooled)
    assert torch.equal(again.counts, memory.counts)
    raw = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)
    assert torch.equal(raw, first.pooled.flatten())
    first.pooled.zero_()  # not the file's
    assert torch.equal(pool_examples(model, TEXTS, PATHS, file=file, progress=False).pooled.flatten(), raw)
    assert not hasattr(model.get_decoder(), "_drllm_routing")


def test_bfloat16_in_a_file(tmp_path):
    model = tiny("llama")
    found = pool_examples(model, TEXTS, PATHS, dtype=torch.bfloat16, file=tmp_path / "w", progress=False)
    assert found.pooled.dtype == torch.bfloat16
    assert torch.equal(found.pooled, pool_examples(model, TEXTS, PATHS, progress=False).pooled.bfloat16())
    assert (tmp_path / "w").stat().st_size == 2 * found.pooled.numel()


def test_a_file_is_of_one_pass(tmp_path):
    model, file = tiny("llama"), tmp_path / "w.bin"
    pool_examples(model, TEXTS, PATHS, file=file, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refused(word, model=model, texts=TEXTS, paths=PATHS, error=ValueError, **options):
        with pytest.raises(error, match=word):
            pool_examples(model, texts, paths, file=file, progress=False, **options)

    refused("prompts is", texts=[*TEXTS[:-1], TEXTS[-1][:-1] + [5]])
    refused("plans is", paths=[*PATHS[:-1], PATHS[0]])
    refused("shape is", texts=TEXTS[:-1], paths=PATHS[:-1])
    refused("shape is", windows=4)
    refused("dtype is float32, not bfloat16", dtype=torch.bfloat16)
    refused("model is", model=tiny("llama", seed=1))
    merged = tiny("llama")
    with torch.no_grad():
        merged.model.layers[2].mlp.down_proj.weight.mul_(1.01)  # as a merged adapter does
    refused("model is", model=merged)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    file.write_bytes(before["w.bin"][:-4])
    refused("damaged: it must have", error=OSError)
    (tmp_path / "w.bin.json").write_text("{")
    refused("is damaged", error=OSError)
    (tmp_path / "w.bin.json").unlink()
    refused("is no file of windows")
    assert file.read_bytes() == before["w.bin"][:-4]
    with pytest.raises(OSError, match="there is no folder"):
        pool_examples(model, TEXTS, PATHS, file=tmp_path / "none" / "w", progress=False)


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left.*make room"):
        pool_examples(tiny("llama"), TEXTS, PATHS, file=tmp_path / "w", progress=False)
    monkeypatch.undo()
    assert pool_examples(tiny("llama"), TEXTS, PATHS, file=tmp_path / "w", progress=False).pooled.any()


# -- refusals
def test_states_that_are_not_finite_are_named():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    skipping = [(1, 0, 1, 1)] * len(TEXTS)
    assert pool_examples(model, TEXTS, skipping, progress=False).pooled.isfinite().all()
    skipping[3] = (1, 1, 1, 1)
    with pytest.raises(ValueError, match="block 2, prompt 3: .*not finite in torch.float32"):
        pool_examples(model, TEXTS, skipping, progress=False)
    assert not hasattr(model.get_decoder(), "_drllm_routing")
    large = tiny("llama")
    with torch.no_grad():
        large.model.embed_tokens.weight.mul_(1e6)
    with pytest.raises(ValueError, match="block 0, prompt .*torch.float16"):
        pool_examples(large, TEXTS, PATHS, dtype=torch.float16, progress=False)


def test_refusals(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(module, "routed_by", None)  # nothing of these gets as far
    for error, words, texts, paths, options in (
        (ValueError, "8 prompts and plans of shape", TEXTS, PATHS[:-1], {}),
        (ValueError, "8 prompts and plans of shape", TEXTS, PATHS[0], {}),
        (ValueError, "the path has 3 entries", TEXTS, [path[:3] for path in PATHS], {}),
        (ValueError, "values from 0 to 3", TEXTS, [(1, 1, 3, 0)] * 8, {}),
        (ValueError, r"prompts \[2\] have no tokens", [*TEXTS[:2], [], *TEXTS[3:]], PATHS, {}),
        (ValueError, r"prompts \[0\] have tokens that are not", [[97], *TEXTS[1:]], PATHS, {}),
        (ValueError, "windows must be at least 1", TEXTS, PATHS, {"windows": 0}),
        (ValueError, "max_tokens must be at least 1", TEXTS, PATHS, {"max_tokens": 0}),
        (TypeError, "dtype must be floating", TEXTS, PATHS, {"dtype": torch.int32}),
        (ValueError, "a plan of shape", [], [], {}),
    ):
        with pytest.raises(error, match=words):
            pool_examples(model, texts, paths, progress=False, **options)
