"""Where the figures of each epoch go, beside the report: nowhere, to the console, to TensorBoard or to Trackio."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Tracker:
    """Takes named numbers once an epoch; this one drops them. Also a context manager, which closes."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ConsoleTracker(Tracker):
    """A line on stderr for each epoch, above the progress bar."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        tqdm.write(f"{step}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()), file=sys.stderr)


class TensorBoardTracker(Tracker):
    """Event files in `folder`/tensorboard."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class TrackioTracker(Tracker):
    """A run of the project drllm-fast, named after `folder`, where Trackio keeps its data on this machine."""

    def __init__(self, folder: Path):
        import trackio

        self._trackio: Any = trackio
        trackio.init(project="drllm-fast", name=folder.resolve().name, resume="allow")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


PACKAGES: dict[str, tuple[str, Callable[[Path], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoardTracker),
    "trackio": ("trackio", TrackioTracker),
}
KINDS = ("auto", "none", "console", *PACKAGES)


def make_tracker(kind: str, folder: Path | None = None) -> Tracker:
    """The tracker `kind`: none, console, tensorboard, trackio; or auto, the first of tensorboard and trackio that is
    installed, else the console.

    folder  of the training; tensorboard writes into it, trackio names the run after it. auto without one: the console

    Raises ValueError for another kind, or where a folder is missing; ImportError, with the command that installs it,
    for a package that is not there.
    """
    if kind not in KINDS:
        raise ValueError(f"the tracker must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "auto":
        there = [name for name, (package, _) in PACKAGES.items() if folder is not None and _installed(package)]
        kind = there[0] if there else "console"
    if kind == "none":
        return Tracker()
    if kind == "console":
        return ConsoleTracker()
    package, make = PACKAGES[kind]
    if not _installed(package):
        raise ImportError(f"the tracker {kind} needs the package {package}: pip install {package}", name=package)
    if folder is None:
        raise ValueError(f"the tracker {kind} needs a folder")
    return make(Path(folder))


def _installed(package: str) -> bool:
    return find_spec(package) is not None
