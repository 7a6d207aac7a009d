"""What it costs a prompt to leave out blocks, from measured paths.

A search that spreads paths over budgets (`drllm-fast search --method spread --reward kl`) leaves, for each prompt,
paths and what they cost: KL(dense || path), or the loss of log-likelihood. Prices of blocks do not add up: what block
17 costs depends on whether block 16 runs. So the cost of a whole path is fitted, not a price for each block:

    cost(x, p) ~ f(z(x), skipped(p), repeated(p))^2      f an ensemble of small perceptrons, z(x) the prompt's features

with the square, for a divergence grows like the square of a disturbance. The features are principal components of the
prompt's mean hidden states at a third and two thirds of the depth of the dense model. The ensemble's mean plus its
spread is what paths are chosen by: a minimum over many paths would otherwise seek out where the fit is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from drllm_fast.router_reference import REPEAT, SKIP
from drllm_fast.training.examples import check_model, stored_path, stored_prompt
from drllm_fast.training.windows import WindowSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRICED = ("kl", "loglik", "margin")  # rewards that are measures, not verdicts


@dataclass
class Measurements:
    """Paths of prompts and what they cost.

    tokens, groups  of N prompts
    owner           int64 [M], the prompt of each of M measured paths
    paths           int8 [M, L]
    costs           fp32 [M], nats; 0 for the dense path
    """

    tokens: list[tuple[int, ...]]
    groups: list[str]
    owner: Tensor
    paths: Tensor
    costs: Tensor


def load_measurements(
    stores: Sequence[str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    limit: int | None = None,
) -> Measurements:
    """The measured paths of one or more searches.

    stores  folders that `drllm-fast search --reward kl` (or loglik, margin) wrote for this model
    limit   the first so many prompts of each

    Raises OSError for a folder without a search, ValueError for a search of another model or reward, and for a cost
    that is not finite.
    """
    from drllm_fast.decoder import decoder_of
    from drllm_fast.search.store import read_store

    layers = len(decoder_of(model).layers)
    groups: dict[tuple[int, ...], str] = {}  # by the tokens of a prompt, which several searches may share
    numbers: dict[tuple[int, ...], int] = {}
    owner, paths, costs = [], [], []
    for folder in map(Path, stores):
        with read_store(folder) as store:
            check_model(store, model)
            reward = store.manifest.config["reward"]
            if reward not in PRICED:
                raise ValueError(
                    f"{folder} was searched with the reward {reward!r}, which prices nothing; search with --reward "
                    f"{', '.join(PRICED)}"
                )
            for number, result in enumerate(store.results()):
                if limit is not None and number >= limit:
                    break
                tokens = stored_prompt(result, tokenizer)
                groups.setdefault(
                    tokens, result.key.task if result.level is None else f"{result.key.task}/{result.level}"
                )
                numbers.setdefault(tokens, len(numbers))
                for path, value in zip(result.paths[1:], result.rewards[1:], strict=True):
                    owner.append(numbers[tokens])
                    paths.append(stored_path(path, result, folder, layers))
                    costs.append(result.rewards[0] - value)
    if not paths:
        raise ValueError(f"no paths were measured in {', '.join(map(str, stores))}; search with more simulations")
    found = torch.tensor(costs, dtype=torch.float32)
    if not found.isfinite().all():
        raise ValueError("some stored rewards are not finite; search these prompts again in float32 or bfloat16")
    return Measurements(
        list(groups), list(groups.values()), torch.tensor(owner), torch.tensor(paths, dtype=torch.int8), found
    )


def features(windows: WindowSet, size: int = 8) -> Tensor:
    """fp32 [N, size], principal components of the prompts, from the windows of their dense paths; unit variance."""
    layers = len(windows.pooled)
    counts = windows.counts.clamp(min=1).unsqueeze(1)
    means = torch.cat(
        [windows.pooled[block].float().sum(1) / counts for block in (layers // 3, 2 * layers // 3)], dim=1
    )
    means = (means - means.mean(0)) / means.std(0, correction=0).clamp(min=1e-6)
    size = min(size, *means.shape)
    _, scale, basis = torch.linalg.svd(means, full_matrices=False)
    return means @ basis[:size].T / (scale[:size] / len(means) ** 0.5).clamp(min=1e-6)


class CostModel:
    """cost(x, p) of the module's docstring, in nats."""

    def __init__(self, weights: list[Tensor], spread: float):
        self.weights, self.spread = weights, spread

    @torch.no_grad()
    def __call__(self, z: Tensor, paths: Tensor) -> Tensor:
        """fp32 [M]: the ensemble's mean and `spread` of its standard deviations, for features [M, f], paths [M, L]."""
        out = _forward(self.weights, _inputs(z, paths))
        return (out.mean(0) + self.spread * out.std(0)).clamp(min=0).square()

    @classmethod
    def fit(
        cls,
        z: Tensor,
        measured: Measurements,
        *,
        members: int = 4,
        width: int = 192,
        epochs: int = 12,
        batch: int = 512,
        spread: float = 0.5,
        seed: int = 0,
        progress: bool = True,
    ) -> tuple[CostModel, dict[str, Any]]:
        """The model of all prompts, and how well it foretells a tenth of them that it was not fitted to: R2 of the
        square root of the cost by a single member, over all and within each group, beside that of one without
        features."""
        generator = torch.Generator().manual_seed(seed)
        held = torch.rand(len(z), generator=generator) < 0.1
        out = measured.costs.sign() * measured.costs.abs().sqrt()
        blind = torch.zeros_like(z)
        options = {"width": width, "epochs": epochs, "batch": batch, "seed": seed, "progress": progress}
        quality: dict[str, Any] = {}
        test = held[measured.owner]
        if test.any() and not test.all():
            for name, given in (("features", z), ("paths alone", blind)):
                weights = _train(given, measured, out, ~test, members=1, **options)
                told = _forward(weights, _inputs(given[measured.owner[test]], measured.paths[test])).mean(0)
                quality[name] = _r2(told, out[test], [measured.groups[i] for i in measured.owner[test].tolist()])
        everything = torch.ones(len(out), dtype=torch.bool)
        weights = _train(z, measured, out, everything, members=members, **options)
        return cls(weights, spread), quality


def _inputs(z: Tensor, paths: Tensor) -> Tensor:
    return torch.cat([z, (paths == SKIP).float(), (paths == REPEAT).float()], dim=-1)


def _forward(weights: list[Tensor], x: Tensor) -> Tensor:
    """fp32 [members, M]."""
    w1, b1, w2, b2, w3, b3 = weights
    hidden = F.gelu(torch.baddbmm(b1, x.expand(len(w1), *x.shape), w1))
    hidden = F.gelu(torch.baddbmm(b2, hidden, w2))
    return torch.baddbmm(b3, hidden, w3).squeeze(-1)


def _train(
    z: Tensor,
    measured: Measurements,
    out: Tensor,
    rows: Tensor,
    *,
    members: int,
    width: int,
    epochs: int,
    batch: int,
    seed: int,
    progress: bool,
) -> list[Tensor]:
    """Each member sees the batches in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    size = z.shape[1] + 2 * measured.paths.shape[1]
    weights = []
    for fan_in, fan_out in ((size, width), (width, width), (width, 1)):
        weights.append(torch.randn(members, fan_in, fan_out, generator=generator) / fan_in**0.5)
        weights.append(torch.zeros(members, 1, fan_out))
    weights = [w.requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.01, fused=True)
    rows = rows.nonzero().squeeze(1)
    steps = -(-len(rows) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    for _ in tqdm(range(epochs), desc="fitting costs", disable=not progress):
        order = torch.stack([rows[torch.randperm(len(rows), generator=generator)] for _ in range(members)])
        for some in order.split(batch, dim=1):
            x = _inputs(z[measured.owner[some]], measured.paths[some])  # [members, batch, size]
            w1, b1, w2, b2, w3, b3 = weights
            hidden = F.gelu(torch.baddbmm(b2, F.gelu(torch.baddbmm(b1, x, w1)), w2))
            told = torch.baddbmm(b3, hidden, w3).squeeze(-1)
            loss = F.smooth_l1_loss(told, out[some], beta=0.1, reduction="sum") / batch
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return [w.detach() for w in weights]


def _r2(told: Tensor, true: Tensor, groups: list[str]) -> dict[str, Any]:
    def share(of: Tensor) -> float:
        return float(1 - (true[of] - told[of]).square().sum() / (true[of] - true[of].mean()).square().sum())

    names = sorted(set(groups))
    members = {name: torch.tensor([group == name for group in groups]) for name in names}
    return {"all": share(torch.ones(len(true), dtype=torch.bool))} | {
        name: share(member) for name, member in members.items() if member.sum() > 2
    }
