"""What the routers read while they are trained: the pooled windows of every block, made once.

Under teacher forcing the frozen model runs the labels, so that the routers' inputs do not depend on the routers: one
packed pass over all prompts replaces a pass in every epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from drllm_fast.decoder import decoder_of, unwrap
from drllm_fast.influence import evaluating
from drllm_fast.paths import prompt_batches, routed_by
from drllm_fast.policies import PromptBatch, as_plan, check_length
from drllm_fast.registration import check_integer
from drllm_fast.router_reference import token_windows
from drllm_fast.training.window_file import WindowFile

SAMPLED = 64  # entries of each parameter that tell one model from another


@dataclass
class WindowSet:
    """pooled  floating [L, N, W, d], windows that a prompt does not use are zero
    counts  int64 [N], how many it uses
    """

    pooled: Tensor
    counts: Tensor


def pool_examples(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    plans: Tensor | Sequence[Sequence[int]],
    *,
    windows: int = 8,
    max_tokens: int = 8192,
    dtype: torch.dtype = torch.float32,
    file: str | Path | None = None,
    progress: bool = True,
) -> WindowSet:
    """The windows of what enters each block while the frozen model reads each prompt along its path; on the CPU.

    model       a causal language model from transformers, routed or not; it is left as it was
    prompts     N lists of token ids
    plans       integers [N, L], 0 skip, 1 execute, 2 repeat: the path of each prompt
    windows     W, the most that a prompt is pooled into; a window is what `router_reference.pool_windows` makes of it
    max_tokens  of a forward; prompts of like lengths share one, and none shares its rows with another
    dtype       of the stored windows; pooling itself is fp32
    file        hold the windows, L N W d numbers, in this file instead of in memory. A pass that was stopped goes on
                where it was, and one that is complete is not run again. `<file>.json` beside it says what it is of
    progress    show a bar

    Raises ValueError for prompts and paths that do not fit the model or each other, for hidden states that are not
    finite in `dtype`, naming block and prompt, and for a file of other windows; OSError for a full or damaged disk.
    """
    decoder = decoder_of(unwrap(model))
    embedding = decoder.get_input_embeddings().weight
    plan = as_plan(plans)
    check_length(plan, len(decoder.layers))
    if plan.ndim != 2 or len(plan) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and plans of shape {list(plan.shape)}; give one path for each prompt")
    check_integer("windows", windows, 1)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating, got {dtype}")
    prompt_batches(prompts, max_tokens)  # whether all of them can be run, also those that were run before
    foreign = [n for n, prompt in enumerate(prompts) if min(prompt) < 0 or max(prompt) >= embedding.shape[0]]
    if foreign:
        raise ValueError(
            f"prompts {foreign[:8]} have tokens that are not among the model's {embedding.shape[0]}; take the "
            "tokenizer of this model"
        )

    shape = (len(decoder.layers), len(prompts), windows, decoder.config.hidden_size)
    store, done = None, []
    if file is None:
        pooled = torch.zeros(shape, dtype=dtype, device="cpu")
    else:
        store = WindowFile(file, shape, dtype, _identity(model, prompts, plan))
        pooled, done = store.open(), store.done
    recorder = _Recorder(plan, windows, pooled)
    left = sorted(set(range(len(prompts))) - set(done))
    batches = prompt_batches([prompts[i] for i in left], max_tokens)
    bar = tqdm(total=len(prompts), initial=len(done), desc="pooling windows", unit="prompt", disable=not progress)
    with bar, routed_by(model, recorder), evaluating(decoder), torch.inference_mode():
        for group, batch in batches:
            recorder.rows = [left[i] for i in group]
            decoder(**{name: tensor.to(embedding.device) for name, tensor in batch.items()}, use_cache=False)
            if store is not None:
                store.mark(recorder.rows)
            bar.update(len(group))
    counts = torch.tensor([min(windows, len(prompt)) for prompt in prompts], dtype=torch.int64, device="cpu")
    return WindowSet(pooled if store is None else store.read(), counts)


def pool(hidden: Tensor, cu_seqlens: Tensor, windows: int) -> Tensor:
    """fp32 [B, windows, d], what `router_reference.pool_windows` returns, without a loop over rows and without waiting
    for the device. hidden [P, d] and cu_seqlens [B + 1] as there, not checked."""
    slot, share, counts = token_windows(cu_seqlens, len(hidden), windows)
    slots = len(counts) * windows
    pooled = hidden.new_zeros(slots + 1, hidden.shape[1], dtype=torch.float32)
    pooled.index_add_(0, slot, hidden.float() * share.unsqueeze(1))
    return pooled[:slots].unflatten(0, (len(counts), windows))


class _Recorder:
    """The policy of the pass: it answers with the labels, and keeps the windows of what it is shown."""

    def __init__(self, plan: Tensor, windows: int, pooled: Tensor):
        self.plan, self.windows, self.pooled = plan, windows, pooled
        self.rows: list[int] = []  # the prompts of the forward that runs

    def route(self, layer: int, prompts: PromptBatch) -> Tensor:
        pooled = pool(prompts.hidden, prompts.cu_seqlens, self.windows).to("cpu", self.pooled.dtype)
        finite = pooled.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise ValueError(
                f"block {layer}, prompt {self.rows[finite.index(False)]}: its hidden states are not finite in "
                f"{self.pooled.dtype}; look for NaN in the model's weights, and use bfloat16 or float32 if float16 "
                "overflows"
            )
        self.pooled[layer, self.rows] = pooled
        return self.plan[self.rows, layer]


def _identity(model: nn.Module, prompts: Sequence[Sequence[int]], plan: Tensor) -> dict[str, str]:
    """What decides the windows, as hashes. Of the model, entries of every parameter: the fingerprint alone would not
    tell a model from the same with a merged adapter."""
    weights = hashlib.sha256()
    for name, parameter in unwrap(model).named_parameters():
        weights.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        if type(parameter.data) is Tensor and not parameter.is_meta:  # not of a quantised kind
            entries = parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLED)]
            weights.update(entries.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    texts = json.dumps([list(map(int, prompt)) for prompt in prompts])
    return {
        "model": weights.hexdigest()[:16],
        "prompts": hashlib.sha256(texts.encode()).hexdigest()[:16],
        "plans": hashlib.sha256(plan.numpy().tobytes()).hexdigest()[:16],
    }
