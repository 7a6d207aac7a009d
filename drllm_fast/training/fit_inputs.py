"""What a fit is given: refused where it does not belong together, counted, hashed, split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from drllm_fast.router_reference import CLASSES
from drllm_fast.routers import LayerRouters
from drllm_fast.training.loss import check_targets
from drllm_fast.training.windows import WindowSet


def check_inputs(
    routers: LayerRouters, windows: WindowSet, targets: Tensor, groups: Sequence[str] | None, *, classes: bool
) -> None:
    """Raises TypeError or ValueError, naming layer and prompt where it can, unless routers can be trained on this.

    classes: whether the targets are classes or their probabilities, as the default objective needs them.
    """
    pooled, counts = windows.pooled, windows.counts
    if not pooled.is_floating_point() or counts.is_floating_point():
        raise TypeError(f"pooled must be floating and counts integer, got {pooled.dtype} and {counts.dtype}")
    if any(parameter.dtype != torch.float32 for parameter in routers.parameters()):
        raise TypeError("routers are trained in float32; convert them with routers.float()")
    sizes = (routers.num_layers, routers.windows, routers.hidden_size)
    if pooled.ndim != 4 or (pooled.shape[0], *pooled.shape[2:]) != sizes or counts.shape != pooled.shape[1:2]:
        raise ValueError(
            f"the routers are for windows [{sizes[0]}, N, {sizes[1]}, {sizes[2]}] (layers, prompts, windows, hidden "
            f"size) with counts [N], got {list(pooled.shape)} and {list(counts.shape)}; make windows and routers of "
            "one model, with the same number of windows"
        )
    prompts = len(counts)
    if prompts < 2:
        raise ValueError(f"{prompts} prompts are too few to train on; give at least 2, and as many as validation needs")
    _check_targets(targets, prompts, routers.num_layers, classes)
    if groups is not None and (len(groups) != prompts or not all(isinstance(name, str) for name in groups)):
        raise ValueError(f"groups must be one name for each of the {prompts} prompts, got {groups!r:.80}")
    outside = ((counts < 1) | (counts > routers.windows)).nonzero().flatten().tolist()
    if outside:
        raise ValueError(
            f"prompts {outside[:8]} use {counts[outside[:8]].tolist()} windows; each must use 1 to {routers.windows}. "
            "A prompt without tokens has none: leave it out"
        )
    check_finite(pooled)


def _check_targets(targets: Tensor, prompts: int, layers: int, classes: bool) -> None:
    expected = [[prompts, layers], [prompts, layers, CLASSES]]
    if not classes:
        if not targets.ndim or len(targets) != prompts:
            raise ValueError(f"targets must be [{prompts}, ...], one entry a prompt, got {list(targets.shape)}")
    elif list(targets.shape) != expected[targets.is_floating_point()]:
        raise ValueError(
            f"targets must be classes, integer {expected[0]}, or probabilities, floating {expected[1]}, got "
            f"{targets.dtype} {list(targets.shape)}; other targets need an objective of their own"
        )
    else:
        check_targets(targets)


def check_finite(pooled: Tensor) -> None:
    """ValueError, naming layer and prompt, for the first NaN or infinity of [L, N, W, d]."""
    for layer, of_layer in enumerate(pooled):
        least, most = of_layer.aminmax()  # NaN where there is one, and no mask as large as the windows
        if not (least.isfinite() and most.isfinite()):
            prompt = int((~of_layer.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"the windows of layer {layer}, prompt {prompt} are not finite: the model overflowed there, or the "
                "dtype they are stored in did; make them in bfloat16 or float32, or leave the prompt out"
            )


def data_hash(windows: WindowSet, targets: Tensor, groups: Sequence[str] | None) -> str:
    """16 hex digits that change with any value, type or shape."""
    digest = hashlib.sha256()
    for part in (*windows.pooled, windows.counts, targets):
        digest.update(f"{part.dtype} {list(part.shape)}".encode())
        digest.update(_bytes(part))
    digest.update(json.dumps(None if groups is None else list(groups)).encode())
    return digest.hexdigest()[:16]


def weights_hash(routers: LayerRouters) -> str:
    """16 hex digits of the routers' weights."""
    digest = hashlib.sha256()
    for parameter in routers.parameters():
        digest.update(_bytes(parameter.detach()))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())


def split(prompts: int, validation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the prompts to train on and of those held out, ascending: round(prompts * validation) held out, at
    least one unless validation is 0. ValueError if that leaves none to train on."""
    held = max(1, round(prompts * validation)) if validation else 0
    if held >= prompts:
        raise ValueError(
            f"validation={validation} of {prompts} prompts leaves none to train on; give more, or a smaller share"
        )
    order = np.random.default_rng([seed]).permutation(prompts)
    return np.sort(order[held:]), np.sort(order[:held])
