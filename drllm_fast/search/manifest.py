"""What a search's output folder is of: model, configuration, task, seed. One `manifest.json`, written once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from drllm_fast import __version__
from drllm_fast.atomic import written
from drllm_fast.search.unit import SearchConfig, UnitKey

FILE = "manifest.json"
FORMAT, FORMAT_VERSION = "drllm-fast search", 1


@dataclass(frozen=True)
class Manifest:
    """What decides the results in a folder. Every value is fit for JSON.

    model        name or folder of the model; not compared, one model has many names
    fingerprint  as `drllm_fast.fingerprint.fingerprint` returns it
    task         which prompts: any JSON value
    store        "sqlite" or "parquet"
    """

    model: str
    fingerprint: dict[str, Any]
    model_hash: str
    config: dict[str, Any]
    config_hash: str
    task: Any
    seed: int
    grader: str
    store: str = "sqlite"
    package_version: str = ""

    @classmethod
    def of(cls, *, model: str, fingerprint: dict[str, Any], config: SearchConfig, task: Any, seed: int) -> Manifest:
        values = json.loads(json.dumps(asdict(config)))  # tuples become lists, as they will when read back
        return cls(
            model=model,
            fingerprint=fingerprint,
            model_hash=fingerprint_hash(fingerprint),
            config=values,
            config_hash=config.hash(),
            task=json.loads(json.dumps(task)),
            seed=seed,
            grader=config.grader,
            package_version=__version__,
        )

    def search_hash(self) -> str:
        """16 hex digits of what decides the results: alike in two folders only if their units may be mixed."""
        parts = [self.model_hash, self.config_hash, self.task, self.seed, self.grader]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def check_key(self, key: UnitKey) -> None:
        """ValueError unless the unit is of this model, configuration and seed."""
        for name, given, own in (
            ("model", key.model, self.model_hash),
            ("configuration", key.config, self.config_hash),
            ("seed", key.seed, self.seed),
        ):
            if given != own:
                raise ValueError(
                    f"unit {key.text()!r} has {name} {given}, but the store is of {name} {own}; build keys from the "
                    "opened store's manifest"
                )


def fingerprint_hash(fingerprint: dict[str, Any]) -> str:
    """12 hex digits. Copies of one model in other precisions may differ here and still be the same model."""
    text = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest unless there is one, and return the one that is there: another process may be first."""
    values = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(manifest)
    try:
        with written(folder / FILE, once=True) as file:
            file.write((json.dumps(values, indent=2) + "\n").encode())
    except FileExistsError:
        pass
    return read(folder)


def read(folder: Path) -> Manifest:
    """FileNotFoundError without a manifest, OSError for a damaged one, ValueError for one of something else."""
    file = folder / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is no output of a search: it has no {FILE}") from error
    except ValueError as error:  # not JSON, not UTF-8
        raise OSError(f"{file} is damaged: {error}. Nothing was changed; search into another folder") from error
    known = {"format": FORMAT, "format_version": FORMAT_VERSION}
    found = {name: values.get(name) for name in known} if isinstance(values, dict) else values
    if found != known:
        raise ValueError(f"{file}: expected {known}, found {found!r:.120}; nothing was changed, choose another folder")
    try:
        return Manifest(**{name: value for name, value in values.items() if name not in known})
    except TypeError as error:
        raise OSError(f"{file} is damaged: {error}. Nothing was changed; search into another folder") from error


def check_same(
    folder: Path, stored: Manifest, given: Manifest, check: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """ValueError that says what differs, unless both are of one search.

    check: called with the stored fingerprint, raises ValueError for another model; without it, hashes are compared.
    """
    differences = []
    if check is not None:
        try:
            check(stored.fingerprint)
        except ValueError as error:
            differences.append(f"model: {error}")
    elif stored.model_hash != given.model_hash:
        differences.append(f"model: {stored.model} ({stored.model_hash}), not {given.model} ({given.model_hash})")
    for name in ("config", "task", "seed", "grader"):
        differences += _unlike(name, getattr(stored, name), getattr(given, name))
    if differences:
        raise ValueError(
            f"{folder} holds another search: {'; '.join(differences)}. Nothing was changed; give another --output, or "
            "the settings of this one to go on with it"
        )


def check_folder(folder: Path, given: Manifest) -> None:
    """What `check_same` finds before the model is there: its fingerprint is not compared. Errors as `read`'s."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder for the search's output")
    if (folder / FILE).exists():
        check_same(folder, read(folder), given, lambda fingerprint: None)


def with_store(manifest: Manifest, store: str) -> Manifest:
    return replace(manifest, store=store)


def _unlike(name: str, stored: Any, given: Any) -> list[str]:
    if isinstance(stored, dict) and isinstance(given, dict):
        names = stored | given
        return [line for key in names for line in _unlike(f"{name}.{key}", stored.get(key), given.get(key))]
    return [] if stored == given else [f"{name} is {stored!r:.80}, not {given!r:.80}"]
