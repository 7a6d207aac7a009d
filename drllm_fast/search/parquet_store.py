"""Results in Parquet shards: for disks that several machines share.

Each process writes shards of its own, `shards/<writer>-<number>.parquet`, by renaming a finished file; none is ever
changed. There are no locks, so two processes may both store a unit: it is reported once, from the first shard by name.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from drllm_fast.atomic import clean, explained, written
from drllm_fast.search.manifest import Manifest
from drllm_fast.search.record import KEY, columns, from_row, to_row
from drllm_fast.search.store import Store
from drllm_fast.search.unit import UnitResult

FOLDER = "shards"
SEARCH = b"drllm_fast_search"  # Manifest.search_hash(), in a shard's metadata

_ARROW = {
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "str": pa.string(),
    "list[str]": pa.list_(pa.string()),
    "list[float]": pa.list_(pa.float64()),
    "list[bool]": pa.list_(pa.bool_()),
    "list[list[float]]": pa.list_(pa.list_(pa.float64())),
}


def arrow_schema(metadata: dict[str, str]) -> pa.Schema:
    return pa.schema([(name, _ARROW[kind]) for name, kind in columns().items()], metadata=metadata)


class ParquetStore(Store):
    batch_seconds = 10.0  # a put is a file, and a million small files are a burden on a shared disk

    def __init__(self, folder: Path, manifest: Manifest, *, read_only: bool = False) -> None:
        super().__init__(folder, manifest)
        self.shards = folder / FOLDER
        self._schema = arrow_schema({SEARCH.decode(): manifest.search_hash()})
        self._writer, self._number = uuid.uuid4().hex, 0
        self._keys: dict[str, list[str]] = {}  # of the shards read so far
        if not read_only:
            try:
                self.shards.mkdir(exist_ok=True)
            except OSError as error:
                raise explained(error, self.shards) from error
            clean(self.shards)
        self._known = self.done()

    def done(self) -> set[str]:
        names = self._names()
        for name in names:
            if name not in self._keys:
                self._keys[name] = self._read(name, [KEY]).column(KEY).to_pylist()
        return {key for name in names for key in self._keys[name]}

    def put(self, results: Sequence[UnitResult]) -> int:
        self._check(results)
        new = {row[KEY]: row for row in map(to_row, reversed(results)) if row[KEY] not in self._known}
        if not new:
            return 0
        table = pa.Table.from_pylist(list(reversed(new.values())), schema=self._schema)
        # Made in memory: what can go wrong while the file is open is then only the disk.
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        name = f"{self._writer}-{self._number:06d}.parquet"
        with written(self.shards / name, once=True) as file:
            file.write(buffer.getvalue())
        self._number += 1
        self._known |= new.keys()
        return len(new)

    def results(self) -> Iterator[UnitResult]:
        """Every stored unit once, in the order of `UnitKey.text()`. The store is held in memory, in Arrow's layout."""
        tables = [self._read(name) for name in self._names()]
        places: dict[str, tuple[int, int]] = {}
        for number, table in enumerate(tables):
            for row, key in enumerate(table.column(KEY).to_pylist()):
                places.setdefault(key, (number, row))
        for key in sorted(places):
            number, row = places[key]
            yield from_row(tables[number].slice(row, 1).to_pylist()[0])

    @property
    def duplicates(self) -> int:
        unique = self.done()
        return sum(len(self._keys[name]) for name in self._names() if name in self._keys) - len(unique)

    def close(self) -> None:
        self._keys.clear()

    def _names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.shards) if name.endswith(".parquet"))
        except FileNotFoundError:  # a store that was read before anything was put
            return []

    def _read(self, name: str, names: list[str] | None = None) -> pa.Table:
        path = self.shards / name
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                schema, table = file.schema_arrow, file.read(names)
        except (pa.ArrowException, OSError) as error:
            raise OSError(
                f"{path} is damaged or unreadable: {error}. Nothing was changed; move it away and run again to search "
                "its units anew"
            ) from error
        if not schema.equals(self._schema) or (schema.metadata or {}).get(SEARCH) != self._schema.metadata[SEARCH]:
            raise ValueError(f"{path} is not of this search; nothing was changed, move it away")
        return table
