"""What chooses layer paths: the protocol, a given plan, and how a user's argument becomes a policy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drllm_fast.router_reference import REPEAT, SKIP

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


@dataclass(frozen=True)
class PromptBatch:
    """What a policy sees at one block: the prompts of a batch, packed, without padding.

    hidden      [P, d]   residual stream entering the block, prompt tokens only (never answer or draft tokens); it may
                         be the model's own tensor, so do not write to it
    cu_seqlens  [B + 1]  int32, same device: row b owns hidden[cu_seqlens[b] : cu_seqlens[b + 1]]
    input_ids   [P]      the prompts' token ids; None when the model was called with inputs_embeds
    memory               what a policy wants to keep from block to block of the same forward
    """

    hidden: Tensor
    cu_seqlens: Tensor
    input_ids: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict, compare=False)


@runtime_checkable
class RoutingPolicy(Protocol):
    """Chooses layer paths. One method; it is called at each block while a prompt is prefilled, never at decode."""

    def route(self, layer: int, prompts: PromptBatch) -> Tensor:
        """Return integers [B]: how often `layer` runs for each row (0 skip, 1 execute, 2 repeat).

        A policy that knows whole paths before block 0 returns [B, L] instead and is not asked again for this batch.
        """
        ...


class GivenPlan:
    """The plan the user gives: one path [L] for every row, or paths [P, L].

    P paths also serve a batch of P * k rows in Hugging Face's expand order (beams, return sequences): row b takes
    path b // k.
    """

    def __init__(self, plan: Tensor | Sequence[int] | Sequence[Sequence[int]]):
        self.plan = as_plan(plan)

    def bind(self, model: PreTrainedModel) -> None:
        check_length(self.plan, model.config.get_text_config(decoder=True).num_hidden_layers)

    def route(self, layer: int, prompts: PromptBatch) -> Tensor:
        return self.expand(prompts.cu_seqlens.numel() - 1)

    def expand(self, rows: int) -> Tensor:
        """int8 [rows, L]. ValueError when `rows` is no multiple of the number of paths."""
        paths = self.plan.unsqueeze(0) if self.plan.ndim == 1 else self.plan
        if rows % len(paths):
            raise ValueError(
                f"the plan has {len(paths)} paths and the batch {rows} rows; give one path for all rows, one for each "
                "row, or one for each prompt of a batch that is expanded to beams or return sequences"
            )
        return paths.repeat_interleave(rows // len(paths), dim=0)


def as_plan(plan: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """int8 [L] or [P, L] on the CPU, checked.

    Raises TypeError for anything but integers, ValueError for ragged or empty plans and for values outside 0..2.
    """
    allowed = "a layer path is L integers, 0 skip, 1 execute, 2 repeat; a plan is one path or a list of paths"
    if not isinstance(plan, Tensor):
        try:
            plan = torch.as_tensor(plan, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            ragged = isinstance(plan, Sequence) and len({len(p) for p in plan if isinstance(p, Sequence)}) > 1
            raise (ValueError if ragged else TypeError)(
                f"{'ragged plan' if ragged else f'not a plan: {plan!r:.80}'}; {allowed}"
            ) from error
    if plan.numel() == 0 or plan.ndim not in (1, 2):
        raise ValueError(f"a plan of shape {tuple(plan.shape)}; {allowed}")
    if plan.is_floating_point() or plan.is_complex() or plan.dtype == torch.bool:
        raise TypeError(f"a plan of {plan.dtype}; {allowed}")
    if plan.min() < SKIP or plan.max() > REPEAT:
        raise ValueError(f"a plan with values from {int(plan.min())} to {int(plan.max())}; {allowed}")
    return plan.detach().to("cpu", torch.int8, copy=True)


def check_length(plan: Tensor, num_layers: int) -> None:
    if plan.shape[-1] != num_layers:
        raise ValueError(
            f"the path has {plan.shape[-1]} entries, the model {num_layers} layers; give one entry for each layer"
        )


def check_decisions(decisions: object, rows: int, num_layers: int, layer: int) -> list[int] | Tensor:
    """What a policy returned: the decisions of each row, or whole paths, int8 [B, L] on the CPU. TypeError / ValueError
    name the policy's mistake."""
    where = f"the policy's answer at layer {layer}"
    if not isinstance(decisions, Tensor):
        raise TypeError(f"{where} is {type(decisions).__name__}; route() returns an integer tensor [B] or [B, L]")
    if decisions.dtype not in INTEGERS:
        raise TypeError(f"{where} is {decisions.dtype}; route() returns integers")
    if decisions.shape not in ((rows,), (rows, num_layers)):
        raise ValueError(
            f"{where} has shape {tuple(decisions.shape)}; for this batch it must be ({rows},), or ({rows}, "
            f"{num_layers}) to fix whole paths"
        )
    column = decisions.ndim == 1
    values = decisions.tolist() if column else [int(end) for end in decisions.aminmax()] if rows else []
    if values and (min(values) < SKIP or max(values) > REPEAT):
        raise ValueError(
            f"{where} has values from {min(values)} to {max(values)}; allowed are 0 skip, 1 execute, 2 repeat"
        )
    return values if column else decisions.to("cpu", torch.int8)


def as_policy(policy: object) -> RoutingPolicy:
    """A user's argument as a policy: a policy itself, a path, a plan, the name of a router checkpoint, or the file of a
    static policy (.json)."""
    if isinstance(policy, str | os.PathLike) and os.fspath(policy).endswith(".json"):
        from drllm_fast.influence import StaticPolicy

        return StaticPolicy.load(os.fspath(policy))
    if isinstance(policy, str | os.PathLike):
        from drllm_fast.routers import LayerRouters

        return LayerRouters.from_pretrained(os.fspath(policy))
    if callable(getattr(policy, "route", None)) and not isinstance(policy, type):
        return policy
    if isinstance(policy, Tensor | Sequence) or hasattr(policy, "__array__"):
        return GivenPlan(policy)
    raise TypeError(
        f"not a policy: {type(policy).__name__}; give a router checkpoint (folder, bundled name or hub id), "
        "LayerRouters, a path [L], a plan [B][L], or an object with a method route(layer, prompts)"
    )
