"""The state of a fit between two epochs, in one file of a folder: tensors, and the epochs so far as its metadata.

One file, written aside and renamed, so that a fit that is killed leaves the last whole epoch. No pickle. An epoch is a
dataclass of figures fit for JSON, and is read back as a dict.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from drllm_fast.atomic import clean, written

FILE = "fit.safetensors"
FORMAT = "drllm-fast fit 1"


def prepare(folder: Path) -> None:
    """Make the folder, and remove what a killed process was writing. OSError where that cannot be."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder for the fit's checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)


def write(folder: Path, identity: dict[str, Any], epochs: list[Any], tensors: dict[str, Tensor]) -> None:
    """Replace the checkpoint. identity: what decides the result, fit for JSON."""
    state = {"identity": identity, "epochs": [asdict(epoch) for epoch in epochs]}
    content = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"format": FORMAT, "state": json.dumps(state)},
    )
    with written(folder / FILE) as file:
        file.write(content)


def read(folder: Path, identity: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Tensor]] | None:
    """The epochs and tensors of a checkpoint, on the CPU; None where there is none.

    Raises ValueError that says what differs for a checkpoint of another fit, OSError for a damaged one.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as checkpoint:
            metadata = checkpoint.metadata() or {}
            tensors = {name: checkpoint.get_tensor(name) for name in checkpoint.keys()}
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} is damaged or unreadable: {error}; remove it, or give another folder") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{file} is not in the format {FORMAT!r}; give another folder")
    state = json.loads(metadata["state"])
    differences = [
        f"{name} is {state['identity'].get(name)!r:.60}, not {value!r:.60}"
        for name, value in identity.items()
        if state["identity"].get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{folder} holds another fit: {'; '.join(differences)}. Nothing was changed; give another folder, or what "
            "that one was given to go on with it"
        )
    return state["epochs"], tensors
