"""Windows in a file that is mapped into memory, so that there may be more of them than fit there.

Beside the file lies `<file>.json`: what the windows are of, and which prompts are done. A prompt is marked only after
its windows are on the disk, so that whatever stops the pass, what is marked is there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from drllm_fast.atomic import explained, written

FORMAT = {"format": "drllm-fast windows", "format_version": 1}


class WindowFile:
    """shape     [L, N, W, d]
    identity  what decides the windows, fit for JSON
    done      numbers of the prompts whose windows are there

    Raises ValueError, before anything has changed, if the file is of other windows or of something else; OSError if it
    is damaged or cannot be written.
    """

    def __init__(self, file: str | Path, shape: Sequence[int], dtype: torch.dtype, identity: dict[str, str]) -> None:
        self.file = Path(file)
        self.marks = self.file.with_name(self.file.name + ".json")
        self.shape, self.dtype = tuple(shape), dtype
        self.about = FORMAT | {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")} | identity
        self.done: list[int] = []
        if not self.file.parent.is_dir():
            raise OSError(f"{self.file}: there is no folder {self.file.parent}")
        if self.marks.exists():
            self._read_marks()
        elif self.file.exists():
            raise ValueError(
                f"{self.file} is no file of windows: there is no {self.marks.name} beside it; name another"
            )

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * self.dtype.itemsize

    def open(self) -> Tensor:
        """The windows, to be written to; the disk's room for them is taken at once."""
        try:
            self._write_marks()  # first: a file without marks is somebody else's
            with open(self.file, "ab") as file:
                # A hole that cannot be filled later would kill the process without a word.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.bytes)
                else:
                    file.truncate(self.bytes)
        except OSError as error:
            raise explained(error, self.file) from error
        return self._mapped(shared=True)

    def mark(self, prompts: Sequence[int]) -> None:
        """These prompts are done as well: their windows go to the disk, then the note of it."""
        with open(self.file, "rb") as file:
            os.fsync(file.fileno())
        self.done = sorted({*self.done, *prompts})
        self._write_marks()

    def read(self) -> Tensor:
        """The windows; what is done to this tensor stays out of the file."""
        return self._mapped(shared=False)

    def _mapped(self, *, shared: bool) -> Tensor:
        flat = torch.from_file(str(self.file), shared=shared, size=self.numbers, dtype=self.dtype, device="cpu")
        return flat.view(self.shape)

    def _write_marks(self) -> None:
        with written(self.marks) as file:
            file.write((json.dumps(self.about | {"done": self.done}) + "\n").encode())

    def _read_marks(self) -> None:
        try:
            found = json.loads(self.marks.read_text(encoding="utf-8"))
            done = [int(number) for number in found.pop("done")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(
                f"{self.marks} is damaged: {error!r}; remove it and {self.file.name}, or name another file"
            ) from error
        unlike = [
            f"{name} is {found.get(name)}, not {self.about.get(name)}"
            for name in self.about | found
            if found.get(name) != self.about.get(name)
        ]
        if unlike:
            raise ValueError(
                f"{self.file} holds other windows: {'; '.join(unlike)}. Nothing was changed; name another file, or "
                "remove this one"
            )
        if done and (not self.file.exists() or self.file.stat().st_size != self.bytes):
            raise OSError(f"{self.file} is damaged: it must have {self.bytes} bytes; remove it and {self.marks.name}")
        self.done = done
