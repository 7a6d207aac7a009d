"""Prompts unlike those that routers were trained on, told by their tokens' embeddings.

    m      mean of what enters block 0 over the prompt's tokens (the embeddings), less the centre of training prompts
    d(m)   1 - max over prototypes k of cos(m, prototype_k)
    guarded where d(m) > radius

Prototypes are the centres of a k-means clustering of the training prompts' m, the radius is a quantile of their own
distances: with 0.99 one training prompt in a hundred would be guarded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Guard:
    """prototypes fp32 [K, d], centre fp32 [d], radius from 0 to 2. ValueError for anything else."""

    prototypes: Tensor
    centre: Tensor
    radius: float

    def __post_init__(self) -> None:
        if self.prototypes.ndim != 2 or not len(self.prototypes) or self.centre.shape != self.prototypes.shape[1:]:
            raise ValueError(
                f"a guard needs prototypes [K, d] and a centre [d], got {list(self.prototypes.shape)} and "
                f"{list(self.centre.shape)}"
            )
        if not 0 <= self.radius <= 2:  # NaN, too
            raise ValueError(f"a guard's radius must be from 0 to 2, got {self.radius}")

    def distances(self, means: Tensor) -> Tensor:
        """fp32 [B] of prompts with mean embeddings [B, d]."""
        directions = F.normalize(means.float() - self.centre, dim=-1)
        return 1 - (directions @ F.normalize(self.prototypes, dim=-1).T).amax(dim=-1)

    def unlike(self, means: Tensor) -> Tensor:
        """bool [B]: which prompts are to run every block once."""
        return self.distances(means) > self.radius

    def to(self, device: torch.device) -> Guard:
        return Guard(self.prototypes.to(device), self.centre.to(device), self.radius)

    @classmethod
    def fit(cls, means: Tensor, *, prototypes: int = 32, quantile: float = 0.99, seed: int = 0) -> Guard:
        """From the mean embeddings [N, d] of the training prompts; on the CPU. ValueError for none, for values that are
        not finite, and for a quantile outside 0..1."""
        if means.ndim != 2 or not len(means):
            raise ValueError(f"means must be [N, d] of at least one prompt, got {list(means.shape)}")
        if not 0 < quantile <= 1 or prototypes < 1:
            raise ValueError(f"quantile must be in (0, 1] and prototypes at least 1, got {quantile} and {prototypes}")
        means = means.detach().to("cpu", torch.float32)  # where random numbers are the same everywhere
        if not means.isfinite().all():
            raise ValueError("means must be finite; look for NaN in the model's embeddings")
        centre = means.mean(dim=0)
        points = F.normalize(means - centre, dim=-1)
        guard = cls(_spherical_k_means(points, min(prototypes, len(points)), seed), centre, 2.0)
        guard.radius = float(torch.quantile(guard.distances(means), quantile).clamp(0, 2))
        return guard


def _spherical_k_means(points: Tensor, k: int, seed: int, rounds: int = 25) -> Tensor:
    """Unit centres [k, d], fewer where the points have fewer directions, of unit points [N, d] (Dhillon & Modha 2001),
    begun at points drawn far from one another (k-means++, Arthur & Vassilvitskii 2007)."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator, device="cpu")]
    while len(centres) < k:
        far = 1 - (points @ centres.T).amax(dim=1)
        far = far.masked_fill(far < 1e-6, 0)  # a centre itself, but for rounding
        if far.sum() == 0:  # fewer directions than k
            break
        centres = torch.cat([centres, points[torch.multinomial(far, 1, generator=generator)]])
    for _ in range(rounds):
        nearest = (points @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
    return centres


def row_means(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """fp32 [B, d]: means over the tokens of each row of packed hidden states [P, d]; zeros of a row without tokens."""
    lengths = cu_seqlens.diff().to(torch.int64)
    rows = torch.arange(len(lengths), device=hidden.device).repeat_interleave(lengths, output_size=len(hidden))
    sums = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32).index_add_(0, rows, hidden.float())
    return sums / lengths.clamp(min=1).unsqueeze(1)
