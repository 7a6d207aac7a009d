"""What the routers read while they are trained: the pooled windows of every block, made once.

Under teacher forcing the frozen model runs the labels, so that the routers' inputs do not depend on the routers: one
packed pass over all prompts replaces a pass in every epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class WindowSet:
    """pooled  floating [L, N, W, d], windows that a prompt does not use are zero
    counts  int64 [N], how many it uses
    """

    pooled: Tensor
    counts: Tensor
