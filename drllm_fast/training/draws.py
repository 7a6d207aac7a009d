"""Paths drawn from routers, and what the routers saw along them.

Block l takes the class argmax_c (z_c - cost_c + T g_c), where z are the router's logits for what enters the block along
the path so far, and g_c independent standard Gumbel numbers: a draw from softmax((z - cost) / T) (the Gumbel-max trick,
Maddison et al. 2014, arXiv 1411.0030). Without noise it is the routers' decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from drllm_fast.decoder import decoder_of, unwrap
from drllm_fast.guard import Guard, row_means
from drllm_fast.influence import evaluating
from drllm_fast.paths import prompt_batches, routed_by
from drllm_fast.policies import PromptBatch
from drllm_fast.router_reference import CLASSES, EXECUTE, decide, router_windows
from drllm_fast.training.windows import WindowSet, pool


@dataclass
class Draws:
    """paths    int8 [R, L] on the CPU
    windows  what the routers saw along them, on the weights' device; None where it was not kept
    """

    paths: Tensor
    windows: WindowSet | None


def draw(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    weights: Sequence[Tensor],
    costs: Tensor,
    *,
    windows: int,
    noise: Tensor | None = None,
    guard: Guard | None = None,
    keep: bool = True,
    max_tokens: int = 8192,
) -> Draws:
    """A path for each of R prompts, lists of token ids; the frozen model reads each along its path.

    weights  w1, b1, w2, b2 of `LayerRouters`
    costs    fp32 [R, 3], subtracted from a row's logits
    windows  W, the most that a prompt is pooled into
    noise    fp32 [R, L, 3], T g of the formula; None: the decisions
    guard    prompts unlike those it knows execute every block
    keep     the windows, L R W d numbers

    A prompt may occur several times; its draws depend on its own rows of costs and noise alone. Raises
    FloatingPointError, naming block and row, for logits that are not finite.
    """
    decoder = decoder_of(unwrap(model))
    embedding = decoder.get_input_embeddings().weight
    policy = _Drawing(weights, costs, noise, windows, guard)
    rows = len(prompts)
    if keep:
        policy.pooled = torch.zeros(
            len(weights[0]), rows, windows, weights[0].shape[2], dtype=torch.float32, device=weights[0].device
        )
    paths = torch.empty(rows, len(decoder.layers), dtype=torch.int8, device="cpu")
    with routed_by(model, policy), evaluating(decoder), torch.inference_mode():
        for group, batch in prompt_batches(prompts, max_tokens):
            policy.rows = torch.tensor(group, device=weights[0].device)
            decoder(**{name: tensor.to(embedding.device) for name, tensor in batch.items()}, use_cache=False)
            paths[group] = decoder._drllm_routing.plan
    if not keep:
        return Draws(paths, None)
    counts = torch.tensor([min(windows, len(prompt)) for prompt in prompts], device=weights[0].device)
    return Draws(paths, WindowSet(policy.pooled, counts))


def budget_costs(penalties: Tensor, margin: float) -> Tensor:
    """fp32 [R, 3], what `LayerRouters.costs` is for each of the penalties [R]."""
    return torch.stack([torch.full_like(penalties, margin), penalties, margin + 2 * penalties], dim=1).float()


def log_probabilities(windows: WindowSet, weights: Sequence[Tensor], costs: Tensor, temperature: float) -> Tensor:
    """fp32 [R, L, 3], of the classes that `draw` drew from with noise of this temperature. Differentiable."""
    logits = router_windows(windows.pooled, windows.counts, *weights).transpose(0, 1)
    return ((logits - costs.unsqueeze(1)) / temperature).log_softmax(-1)


class _Drawing:
    """The policy of the pass: it draws, and keeps what each draw saw."""

    pooled: Tensor | None = None  # [L, R, W, d]
    rows: Tensor  # of the forward that runs

    def __init__(
        self, weights: Sequence[Tensor], costs: Tensor, noise: Tensor | None, windows: int, guard: Guard | None
    ):
        self.weights = [weight.detach() for weight in weights]
        self.device = self.weights[0].device
        self.costs = costs.to(self.device)
        self.noise = None if noise is None else noise.to(self.device)
        self.windows, self.guard = windows, guard

    def route(self, layer: int, prompts: PromptBatch) -> Tensor:
        pooled = pool(prompts.hidden, prompts.cu_seqlens, self.windows).to(self.device)  # [B, W, d]
        counts = prompts.cu_seqlens.diff().clamp(max=self.windows).to(self.device)
        if self.pooled is not None:
            self.pooled[layer, self.rows] = pooled
        own = (weight[layer : layer + 1] for weight in self.weights)
        scores = router_windows(pooled.unsqueeze(0), counts, *own)[0] - self.costs[self.rows]
        if self.noise is not None:
            scores += self.noise[self.rows, layer]
        scores = scores.cpu()
        if not scores.isfinite().all():
            row = self.rows[int((~scores.isfinite()).any(1).nonzero()[0])].item()
            raise FloatingPointError(
                f"block {layer}, row {row}: the routers' logits are not finite; lower the learning rate, look for NaN "
                "in the model's weights, and use bfloat16 or float32 if float16 overflows"
            )
        decisions = decide(scores)
        if self.guard is None:
            return decisions
        if layer == 0:
            self.guard = self.guard.to(prompts.hidden.device)
            prompts.memory["guarded"] = self.guard.unlike(row_means(prompts.hidden, prompts.cu_seqlens)).cpu()
        return decisions.masked_fill(prompts.memory["guarded"], EXECUTE)


def gumbel(rng: np.random.Generator, rows: int, layers: int) -> Tensor:
    """fp32 [rows, layers, 3] of standard Gumbel numbers."""
    return torch.from_numpy(rng.gumbel(size=(rows, layers, CLASSES))).float()
