"""What `--policy` may say, and how it becomes a policy of a model."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Any

import typer

POLICY_HELP = (
    "dense | block-influence | cka | path:1,1,0,2,... | skip:19-21;repeat:27 | a static policy (.json) | "
    "a router checkpoint (folder or hub id)"
)


class Criterion(str, Enum):
    block_influence = "block-influence"
    cka = "cka"


def check_budget(budget: float) -> None:
    """typer.BadParameter for what is no `--budget`."""
    if not 0 < budget <= 1:
        raise typer.BadParameter(f"--budget {budget}: a share of the dense model's blocks, above 0 and at most 1")


def parse_policy(text: str, budget: float | None) -> tuple[str, Any]:
    """What `--policy` says, as (kind, value), before anything heavy is loaded. Raises typer.BadParameter."""
    kind, value = _parse_policy(text)
    if kind == "static" and budget is None:
        raise typer.BadParameter(f"--policy {text} needs --budget, the share of blocks to run, such as 0.9")
    if kind in ("dense", "path", "edits") and budget is not None:
        raise typer.BadParameter(f"--budget: --policy {text} fixes the path, so there is no budget to keep")
    return kind, (value, budget)


def _parse_policy(text: str) -> tuple[str, Any]:
    if text == "dense":
        return "dense", None
    if text in [c.value for c in Criterion]:
        return "static", text
    if text.startswith("path:"):
        path = _integers(text.removeprefix("path:"), text)
        if not set(path) <= {0, 1, 2}:
            raise typer.BadParameter(f"--policy {text}: a path holds 0 (skip), 1 (execute) and 2 (repeat) only")
        return "path", path
    if text.startswith(("skip:", "repeat:")):
        edits: dict[int, int] = {}
        for part in text.split(";"):
            verb, _, numbers = part.strip().partition(":")
            if verb not in ("skip", "repeat"):
                raise typer.BadParameter(f"--policy {text}: {part!r} is neither skip:LAYERS nor repeat:LAYERS")
            for layer in _integers(numbers, text):
                if layer in edits:
                    raise typer.BadParameter(f"--policy {text}: layer {layer} is named twice")
                edits[layer] = 0 if verb == "skip" else 2
        return "edits", edits
    if text.endswith(".json"):
        if not Path(text).is_file():
            raise typer.BadParameter(f"--policy {text}: no such file")
        return "file", text
    from drllm_fast.router_files import bundled_routers

    if "/" not in text and not Path(text).is_dir() and text not in bundled_routers():
        raise typer.BadParameter(f"--policy {text}: no such folder, nor any of: {POLICY_HELP}")
    return "checkpoint", text


def _integers(text: str, whole: str) -> list[int]:
    """'19,22-24' as [19, 22, 23, 24]."""
    out: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(high) < int(low)):
            raise typer.BadParameter(f"--policy {whole}: {part!r} is no layer number; write 19,20 or 19-21")
        out += range(int(low), int(high) + 1) if dash else [int(low)]
    return out


def apply_policy(model: Any, tokenizer: Any, spec: tuple[str, Any], layers: int) -> None:
    """Enable what `parse_policy` returned. ValueError where it does not fit the model."""
    import drllm_fast

    kind, (value, budget) = spec
    if kind == "dense":
        return
    if kind == "edits":
        if max(value) >= layers:
            raise ValueError(f"--policy names layer {max(value)}, and the model has layers 0 to {layers - 1}")
        value = [value.get(layer, 1) for layer in range(layers)]
    elif kind == "static":
        from drllm_fast.influence import StaticPolicy

        value = StaticPolicy.calibrate(model, tokenizer, budget=budget, criterion=value, progress=sys.stderr.isatty())
    elif kind == "file":
        from drllm_fast.influence import StaticPolicy

        value = StaticPolicy.load(value)
    drllm_fast.enable_dynamic_routing(model, value, budget=budget)
