"""What a drawn path counts for in a step: rewards against those of the other draws, and the price of visits.

    A_is = r_is - mean over s' != s of r_is'        REINFORCE with a leave-one-out baseline (Kool et al. 2019,
                                                    "Buy 4 REINFORCE samples, get a baseline for free")
    r_is = value_is - price share_is
    price = (dE[value] / d lambda) / (dE[share] / d lambda)

lambda is the penalty that keeps the budget. If a step of the weights changes the share, lambda answers so that the
budget is kept, and E[value] changes by what lambda does to it: the gradient of E[value] on the line of the budget is
grad E[value] - price grad E[share]. Both derivatives are expectations over the same draws,
E[x d log p / d lambda], with d log p / d lambda = sum over blocks of (E_l[visits] - visits_l) / T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drllm_fast.router_reference import CLASSES

MEMORY = 0.9  # of the derivatives, from step to step


def leave_one_out(rewards: Tensor) -> Tensor:
    """fp64 [B, S] from rewards [B, S] of S >= 2 draws for each of B prompts: minus the mean of the other draws."""
    samples = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (samples / (samples - 1))


def normalised(advantages: Tensor, budgets: Tensor, count: int) -> Tensor:
    """Advantages [B, S] over their root mean square among the prompts of the same budget, so that all budgets count
    alike. budgets [B]: the number of each prompt's, below `count`."""
    squares = advantages.new_zeros(count).index_add(0, budgets, advantages.square().mean(1))
    scale = (squares / torch.bincount(budgets, minlength=count)).sqrt()[budgets].unsqueeze(1)
    return advantages / scale.where(scale > 0, 1)


def slopes(log_p: Tensor, paths: Tensor, temperature: float) -> Tensor:
    """fp64 [R]: d log p(path) / d lambda for paths [R, L] drawn with log-probabilities [R, L, 3]."""
    expected = log_p.detach().double().exp() @ torch.arange(CLASSES, dtype=torch.float64, device=log_p.device)
    return (expected.cpu() - paths.double()).sum(1) / temperature


class Prices:
    """The price of a visit at each of K budgets.

    moments  fp64 [K, 2], dE[value] / d lambda and dE[share] / d lambda, as far as the draws so far tell
    """

    def __init__(self, budgets: int):
        self.moments = torch.zeros(budgets, 2, dtype=torch.float64)

    def tell(self, values: Tensor, shares: Tensor, slopes: Tensor, budgets: Tensor) -> None:
        """The draws of a step: values, shares and slopes fp64 [B, S], the number of each prompt's budget [B]; each
        budget occurs."""
        products = torch.stack([leave_one_out(values) * slopes, leave_one_out(shares) * slopes], -1).mean(1)  # [B, 2]
        prompts = torch.bincount(budgets, minlength=len(self.moments)).unsqueeze(1)
        means = torch.zeros_like(self.moments).index_add(0, budgets, products) / prompts
        self.moments = MEMORY * self.moments + (1 - MEMORY) * means

    def of_a_share(self) -> Tensor:
        """fp64 [K]: what E[value] loses for each unit of share that the penalty takes; 0 as long as it takes none."""
        value, share = self.moments.T
        return torch.where(share < 0, value / share.where(share < 0, 1), 0)
