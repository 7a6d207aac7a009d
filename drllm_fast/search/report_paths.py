"""The paths of a search as a small table without any text of prompts, fit to be published where the data set is not."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from drllm_fast.atomic import written
from drllm_fast.search.report_tally import Unit
from drllm_fast.search.unit import UnitResult

COLUMNS = {
    "task": "string",
    "item": "string",
    "seed": "int64",
    "level": "int64",
    "dense_correct": "bool",
    "kept": "bool",
    "best": "string",
    "visits": "int64",
    "control_reached": "bool",
}
ENDINGS = (".csv", ".csv.gz", ".parquet")


def write_paths(path: str | PathLike[str], results: Iterable[UnitResult], *, label_free: bool = False) -> int:
    """Write a row a unit: COLUMNS, `best` one digit a block. Returns the rows.

    path        ends with .csv, .csv.gz or .parquet; replaced when all is written, byte for byte the same for the same
                results
    label_free  the reward was kl: see `drllm_fast.search.report`

    An empty field is what is not known; in CSV, true and false are 1 and 0, and `best` has to be read as text, or its
    leading zeros are lost. ValueError for another ending, OSError where the file cannot be written.
    """
    path = Path(path)
    if not path.name.lower().endswith(ENDINGS):
        raise ValueError(f"cannot tell the format of {str(path)!r}: end it with one of {', '.join(ENDINGS)}")
    rows = (_row(Unit(result, label_free)) for result in results)
    with written(path) as file:
        if path.suffix.lower() == ".parquet":
            return _write_parquet(file, rows)
        if path.suffix.lower() == ".csv":
            return _write_csv(file, rows)
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
            return _write_csv(packed, rows)


def _row(unit: Unit) -> dict[str, Any]:
    key = unit.result.key
    dense = None if unit.right is None else unit.dense
    values = (key.task, key.item, key.seed, unit.result.level, dense, unit.result.kept, unit.result.best, unit.visits)
    return dict(zip(COLUMNS, (*values, unit.result.control_reached), strict=True))


def _write_csv(file: Any, rows: Iterator[dict[str, Any]]) -> int:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    count = 0
    for row in rows:
        count += 1
        writer.writerow(int(value) if isinstance(value, bool) else value for value in row.values())
    text.detach()  # flushes, and leaves the file open
    return count


def _write_parquet(file: Any, rows: Iterator[dict[str, Any]]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, file, compression="zstd")
    return table.num_rows
