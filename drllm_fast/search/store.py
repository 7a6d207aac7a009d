"""The output folder of a search: a manifest and the results of finished units, in SQLite or in Parquet shards.

A folder is of one search. Opening it with another model, configuration or task is an error that says what differs, and
nothing is ever overwritten. A unit that is stored is not searched again, so a stopped search goes on by running the
same command.

sqlite   one file on one machine, written by any number of its processes
parquet  shards, each written by one process and never changed: for disks that several machines share, where SQLite's
         locks do not work
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from drllm_fast.atomic import clean, explained, written
from drllm_fast.search import manifest as manifests
from drllm_fast.search.manifest import Manifest
from drllm_fast.search.record import to_row
from drllm_fast.search.unit import UnitResult

Kind = Literal["auto", "sqlite", "parquet"]
SHARED_DISKS = (
    "nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "gluster", "fuse", "9p", "afs", "ocfs2", "gfs2", "pvfs",
    "orangefs", "panfs", "wekafs",
)  # fmt: skip
EXPORT_ROWS = 1024  # of a row group


class Store(ABC):
    """Results of one search. Build units' keys with `manifest.model_hash`: the folder's, not the loaded model's.

    batch_seconds  results may be collected for as long before they are put, where a put costs a file of its own
    """

    batch_seconds = 0.0

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @property
    def kind(self) -> str:
        return self.manifest.store

    @abstractmethod
    def done(self) -> set[str]:
        """`UnitKey.text()` of every stored unit, those that other processes have put by now included."""

    @abstractmethod
    def put(self, results: Sequence[UnitResult]) -> int:
        """Store results durably, all or none; units that are stored already are left as they are. Returns how many
        were new. Raises OSError for a full or damaged disk, ValueError for a unit of another search."""

    @abstractmethod
    def results(self) -> Iterator[UnitResult]:
        """Every stored unit once, in the order of `UnitKey.text()`."""

    @property
    def duplicates(self) -> int:
        """How many stored results are of a unit that is stored already: processes that did not know of each other."""
        return 0

    @abstractmethod
    def close(self) -> None: ...

    def export(self, path: str | Path) -> int:
        """Write one Parquet file that `datasets.load_dataset("parquet", data_files=...)` reads; returns its rows.

        The manifest is in the schema's metadata, under `drllm_fast`.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        from drllm_fast.search.parquet_store import arrow_schema

        path, rows = Path(path), 0
        schema = arrow_schema({"drllm_fast": json.dumps(asdict(self.manifest))})
        with written(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for group in _groups(self.results(), EXPORT_ROWS):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                rows += len(group)
        return rows

    def _check(self, results: Sequence[UnitResult]) -> None:
        for result in results:
            self.manifest.check_key(result.key)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_store(
    folder: str | Path,
    manifest: Manifest,
    kind: Kind = "auto",
    *,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Store:
    """Open the output folder of a search, or make it.

    kind   "auto" is the folder's own kind; in a new one, Parquet on a shared disk or in a launch over several
           machines, else SQLite. `Store.kind` says which.
    check  called with the fingerprint in the folder, raises ValueError for another model:
           `functools.partial(drllm_fast.fingerprint.check, model)`. Without it the fingerprints must be equal.

    Raises ValueError for a folder of another search or of something else, OSError for one that is damaged, read-only
    or full.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{folder} is a file; give a folder for the search's output") from error
    except OSError as error:
        raise explained(error, folder) from error
    # The list comes before the manifest is looked for: another process may be making the folder just now, and writes
    # the manifest first.
    foreign = sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "lost+found")
    if not (folder / manifests.FILE).exists():
        if foreign:
            raise ValueError(
                f"{folder} is not empty and no output of a search: it has {', '.join(foreign[:5])} but no "
                f"{manifests.FILE}. Give a new folder"
            )
        new = manifests.with_store(manifest, choose_kind(folder) if kind == "auto" else kind)
        stored = manifests.write(folder, new)
    else:
        stored = manifests.read(folder)
    manifests.check_same(folder, stored, manifest, check)
    if kind not in ("auto", stored.store):
        raise ValueError(f"{folder} is a store of kind {stored.store}, not {kind}; leave the kind out, or give another")
    clean(folder)
    return _open(folder, stored, read_only=False)


def read_store(folder: str | Path) -> Store:
    """Open the output of a search to read it, whatever it is of; nothing is written.

    Raises FileNotFoundError where there is none, OSError for a damaged one.
    """
    return _open(Path(folder), manifests.read(Path(folder)), read_only=True)


def choose_kind(folder: Path) -> str:
    """The kind for a new store in `folder`."""
    several_machines = int(os.environ.get("WORLD_SIZE", 1)) > int(
        os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1))
    )
    return "parquet" if several_machines or disk_type(folder).startswith(SHARED_DISKS) else "sqlite"


def disk_type(folder: Path) -> str:
    """The kind of file system as Linux names it; empty where that cannot be told."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    folder, found = folder.resolve(), ("", "")
    for line in lines:
        _, place, kind, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if folder.is_relative_to(place) and len(place) >= len(found[0]):
            found = place, kind
    return found[1]


def _open(folder: Path, manifest: Manifest, *, read_only: bool) -> Store:
    if manifest.store == "sqlite":
        from drllm_fast.search.sqlite_store import SqliteStore

        return SqliteStore(folder, manifest, read_only=read_only)
    if manifest.store == "parquet":
        from drllm_fast.search.parquet_store import ParquetStore

        return ParquetStore(folder, manifest, read_only=read_only)
    raise ValueError(f"{folder}: a store of kind {manifest.store!r}; this version knows sqlite and parquet")


def _groups(results: Iterator[UnitResult], size: int) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for result in results:
        group.append(to_row(result))
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
