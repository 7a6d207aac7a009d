"""The weights of routers while they are trained, and the optimiser that moves them; fit for a checkpoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drllm_fast.routers import LayerRouters


class Descent:
    """AdamW on a copy of the routers' weights, so that what interrupts a training leaves the routers as they were.

    step     how many steps were taken
    weights  w1, b1, w2, b2 of `LayerRouters`
    """

    def __init__(
        self,
        routers: LayerRouters,
        *,
        learning_rate: float,
        weight_decay: float,
        device: torch.device | None = None,
    ):
        self.names = [name for name, _ in routers.named_parameters()]
        self.weights = [p.detach().clone().to(device or p.device).requires_grad_() for p in routers.parameters()]
        self.optimizer = torch.optim.AdamW(self.weights, lr=learning_rate, weight_decay=weight_decay, fused=True)
        self.step = 0

    def descend(self, loss: Tensor, *, rate: float | None = None, clip: float = math.inf) -> float:
        """A step down the gradient of `loss`, and the norm that the gradient had before it was clipped.

        rate  the learning rate from this step on; clip: the largest norm
        """
        if rate is not None:
            self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        norm = math.nan if math.isinf(clip) else torch.nn.utils.clip_grad_norm_(self.weights, clip).item()
        self.optimizer.step()
        self.step += 1
        return norm

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"fit.step": torch.tensor(self.step)}
        for name, weight in zip(self.names, self.weights, strict=True):
            tensors[name] = weight
            tensors |= {f"{name}.{key}": value for key, value in self.optimizer.state[weight].items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """What `tensors` gave."""
        self.step = int(tensors["fit.step"])
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.copy_(tensors[name])
            prefix = f"{name}."
            self.optimizer.state[weight] = {
                key.removeprefix(prefix): value.to(weight.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }

    @torch.no_grad()
    def give(self, routers: LayerRouters) -> None:
        """The weights to the routers."""
        for parameter, weight in zip(routers.parameters(), self.weights, strict=True):
            parameter.copy_(weight)
