"""Prompts in a file, answers in another, and going on where a run was stopped.

answers.jsonl            a line for each answer, in the order in which they end; each is one write
answers.jsonl.meta.json  what the answers are of: a hash of the prompts, the model, the policy, the options
.answers.jsonl.lock      held while a process writes, so that no second one does
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from drllm_fast import __version__
from drllm_fast.atomic import explained, written
from drllm_fast.generation.prompt_rows import PromptRow, check_row
from drllm_fast.generation.requests import Generation
from drllm_fast.generation.sampling import Sampling
from drllm_fast.search.rows import SUFFIXES, read_jsonl

FORMAT = {"format": "drllm-fast answers", "format_version": 1}
META = ".meta.json"
ANSWER = ("text", "tokens", "path", "visits", "finish_reason", "prompt_tokens", "seconds")  # as of `Generation`
OUTPUT = ("line", "id", *ANSWER)


def read_rows(path: Path, defaults: Sampling, keep: Collection[str] = ()) -> tuple[list[PromptRow], str]:
    """All rows of a .jsonl or .jsonl.gz file, each checked by `check_row`, and a hash of what they say.

    Without a seed of its own, a row at line n has the default one and n - 1 more: rows draw apart from each other.
    OSError if the file cannot be read; ValueError, with file and line, for what is no prompt, and for no rows at all.
    """
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: prompts are read from {' or '.join(SUFFIXES)} files, one JSON object a line")
    if taken := sorted(set(keep) & set(OUTPUT)):
        raise ValueError(f"the field {taken[0]!r} cannot be kept: every answer has one of its own by that name")
    digest = hashlib.sha256()
    rows = []
    for where, row in read_jsonl(path):
        line = int(where.rpartition(" ")[2])
        rows.append(check_row(row, where, line, replace(defaults, seed=defaults.seed + line - 1), keep))
        digest.update(json.dumps([line, row], sort_keys=True).encode())
    if not rows:
        raise ValueError(f"{path}: no prompt in it; write one JSON object a line")
    return rows, digest.hexdigest()[:16]


def hash_tokens(tokens: Iterable[array]) -> str:
    """16 hex digits of the prompts as the model reads them: another tokenizer or chat template changes them."""
    digest = hashlib.sha256()
    for ids in tokens:
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return digest.hexdigest()[:16]


def hash_policy(policy: Any) -> str:
    """16 hex digits of what a policy decides by: its path or plan, or its weights and settings."""
    guard = getattr(policy, "guard", None)  # a dataclass of tensors
    parts = {
        name: getattr(policy, name, None)
        for name in ("path", "order", "plan", "knob", "margin", "penalty", "calibration")
    }
    parts |= {f"guard.{name}": value for name, value in (vars(guard) if guard is not None else {}).items()}
    parts |= policy.state_dict() if isinstance(policy, nn.Module) else {}
    digest = hashlib.sha256()
    for name, value in parts.items():
        digest.update(name.encode())
        digest.update(
            value.detach().double().cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
        )
    return digest.hexdigest()[:16]


class AnswerFile:
    """The output of one run, or of several that go on with each other. Used in a `with`, which holds its lock.

    `compare` may be called as often as more is known of what the answers are of, then `begin`, then `add`. Nothing is
    written before `begin`.

    overwrite  begin anew, whatever is there

    Raises ValueError for a name that is none for answers and for answers of something else, OSError for files that
    cannot be read or written or are in use.
    """

    def __init__(self, path: Path, *, overwrite: bool = False):
        _check_name(path)
        self.path, self.meta, self.overwrite = path, path.with_name(path.name + META), overwrite
        self.done: set[int] = set()  # lines of the input
        self.tokens = 0  # of the answers that are there, and of those added
        self.paths: Counter[tuple[int, ...]] = Counter()
        self._known: dict[str, Any] | None = None  # what the answers that are there are of
        self.notes: dict[str, Any] = {}  # what was noted beside that
        self._whole = 0  # bytes of whole lines
        self._file: Any = None
        self._held = contextlib.ExitStack()

    def __enter__(self) -> AnswerFile:
        from filelock import FileLock, Timeout

        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), blocking=False)
        try:
            self._held.enter_context(lock)
        except Timeout as error:
            raise OSError(f"{self.path}: another process writes answers into it; wait for it, or stop it") from error
        except OSError as error:
            raise explained(error, self.path) from error
        if not self.overwrite and self.path.exists() and self.path.stat().st_size:
            try:
                self._known = self._read_meta()
                self._read_answers()
            except BaseException:
                self._held.close()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if self._file is not None:
                os.fsync(self._file.fileno())
                self._file.close()
        finally:
            self._held.close()

    def compare(self, made_of: dict[str, Any]) -> None:
        """ValueError that says what differs, if answers are there that were made of something else."""
        made_of = json.loads(json.dumps(made_of))  # tuples become lists
        known = self._known or {}
        unlike = [
            f"{name} is {known[name]!r:.80}, not {value!r:.80}"
            for name, value in made_of.items()
            if name in known and known[name] != value
        ]
        if unlike:
            raise ValueError(
                f"{self.path} holds other answers: {'; '.join(unlike)}. Nothing was changed; give another --output, "
                "what these answers were made with, or --overwrite to begin anew"
            )

    def begin(self, made_of: dict[str, Any], notes: dict[str, Any]) -> None:
        """Make the file ready for more answers: a line that a kill cut short goes; a new file gets its meta data.

        notes  kept for people, not compared
        """
        self.compare(made_of)
        try:
            if self._known is None:  # answers first: there must never be some beside what they are not of
                self.path.open("wb").close()
                with written(self.meta) as file:
                    values = FORMAT | {"package_version": __version__, **notes, "made_of": made_of}
                    file.write((json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
            else:
                os.truncate(self.path, self._whole)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise explained(error, self.path) from error

    def add(self, row: PromptRow, answer: Generation) -> None:
        """Append an answer; it is in the file when this returns."""
        values = {"line": row.line, "id": row.id, **row.kept, **{name: getattr(answer, name) for name in ANSWER}}
        values["seconds"] = round(answer.seconds, 6)
        try:
            text = json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a pair of surrogates, which JSON can say and UTF-8 cannot
            text = json.dumps(values).encode()
        left = memoryview(text + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise explained(error, self.path) from error
        self._count(row.line, len(answer.tokens), answer.path)

    def _count(self, line: int, tokens: int, path: Iterable[int]) -> None:
        self.done.add(line)
        self.tokens += tokens
        self.paths[tuple(path)] += 1

    def _read_meta(self) -> dict[str, Any]:
        advice = "Nothing was changed; give another --output, or --overwrite to begin anew"
        try:
            values = json.loads(self.meta.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.path} is there, and not {self.meta.name} that says what it is of. {advice}"
            ) from error
        except ValueError as error:  # not JSON, not UTF-8
            raise OSError(f"{self.meta} is damaged: {error}. {advice}") from error
        found = {name: values.get(name) for name in FORMAT} if isinstance(values, dict) else values
        if found != FORMAT or not isinstance(values.get("made_of"), dict):
            raise ValueError(f"{self.meta}: expected {FORMAT}, found {found!r:.120}. {advice}")
        self.notes = values
        return values["made_of"]

    def _read_answers(self) -> None:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    values = json.loads(line)
                    of, tokens, path = values["line"], len(values["tokens"]), values["path"]
                    if of in self.done:
                        raise ValueError(f"a second answer to line {of}")
                    self._count(of, tokens, path)
                except (ValueError, KeyError, TypeError) as error:
                    raise OSError(
                        f"{self.path}, line {number} is damaged ({error}). Nothing was changed; mend it, give another "
                        "--output, or --overwrite to begin anew"
                    ) from error
                self._whole += len(line)


def _check_name(path: Path) -> None:
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: answers are appended line by line; give a file name that ends in .jsonl")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file name")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")
