"""Results in one SQLite file, in WAL mode: for the processes of one machine.

A row is `UnitKey.text()` and the result as compressed JSON. Each put is one short transaction, synchronised to disk.
"""

from __future__ import annotations

import errno
import json
import sqlite3
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from drllm_fast.atomic import PREFIX, explained, publish, sync_folder
from drllm_fast.search.manifest import Manifest
from drllm_fast.search.record import from_row, to_row
from drllm_fast.search.store import Store
from drllm_fast.search.unit import UnitResult

FILE = "units.sqlite"
BUSY_SECONDS = 60.0  # a writer waits as long for the others; a put takes milliseconds
_FULL = "database or disk is full"


class SqliteStore(Store):
    def __init__(self, folder: Path, manifest: Manifest, *, read_only: bool = False) -> None:
        super().__init__(folder, manifest)
        self.path = folder / FILE
        with self._explaining():
            if not read_only:
                _create(self.path, manifest.search_hash())
                self._connection = _connect(self.path)
                self._connection.execute("PRAGMA synchronous = FULL")
            else:
                self._connection = _connect_to_read(self.path)
            problem = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise sqlite3.DatabaseError(" ".join(problem.split()))  # it has several lines
            search = self._connection.execute("SELECT hash FROM search").fetchone() or ("",)
        if search[0] != manifest.search_hash():
            raise ValueError(f"{self.path} is of another search than the manifest beside it; move it away")

    def done(self) -> set[str]:
        with self._explaining():
            return {key for (key,) in self._connection.execute("SELECT key FROM units")}

    def put(self, results: Sequence[UnitResult]) -> int:
        self._check(results)
        rows = [to_row(result) for result in results]
        packed = [(row["key"], zlib.compress(json.dumps(row).encode())) for row in rows]
        with self._explaining(), _transaction(self._connection):
            before = self._connection.total_changes
            self._connection.executemany("INSERT OR IGNORE INTO units VALUES (?, ?)", packed)
            new = self._connection.total_changes - before
        return new

    def results(self) -> Iterator[UnitResult]:
        with self._explaining():
            for _, packed in self._connection.execute("SELECT key, result FROM units ORDER BY key"):
                try:
                    row = json.loads(zlib.decompress(packed))
                except (zlib.error, ValueError) as error:
                    raise sqlite3.DatabaseError(str(error)) from error
                yield from_row(row)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """sqlite3's errors as OSErrors that say what to do."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            full = OSError(errno.ENOSPC, str(error))
            if _FULL in str(error):
                raise explained(full, self.path) from error
            if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
                raise OSError(
                    f"{self.path}: {error}. What is stored already stays; check the disk and the folder's permissions "
                    "and run the same command again"
                ) from error
            raise OSError(
                f"{self.path} is damaged: {error}. Nothing was changed; move it and {FILE}-wal and {FILE}-shm away, if "
                "there are such, and run again to search its units anew (`sqlite3 FILE .recover` may save some)"
            ) from error


def _connect(path: Path | str, *, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, uri=uri)


def _connect_to_read(path: Path) -> sqlite3.Connection:
    # Not mode=ro, which would leave a log behind.
    name = path.resolve().as_uri() + "?mode=rw"
    try:
        connection = _connect(name, uri=True)
        connection.execute("PRAGMA query_only = ON")
        connection.execute("SELECT 1 FROM search")
    except sqlite3.OperationalError:
        # In a folder that is read-only SQLite cannot make the files that WAL needs, and needs none if nobody writes.
        log = path.with_name(FILE + "-wal")
        if not path.exists() or (log.exists() and log.stat().st_size):
            raise
        connection = _connect(name + "&immutable=1", uri=True)
    return connection


def _create(path: Path, search: str) -> None:
    """Make the file unless it is there. It gets its name when it is whole, so an empty file is always a damaged one."""
    if path.exists():
        if path.stat().st_size == 0:
            raise sqlite3.DatabaseError("the file is empty")
        return
    if path.with_name(FILE + "-wal").exists() and not path.exists():
        raise sqlite3.DatabaseError(f"{FILE}-wal is there without it")  # SQLite would mix it into the new file
    temporary = path.with_name(PREFIX + uuid.uuid4().hex)
    try:
        connection = _connect(temporary)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            with _transaction(connection):
                connection.execute("CREATE TABLE search (hash TEXT NOT NULL)")
                connection.execute("INSERT INTO search VALUES (?)", (search,))
                connection.execute("CREATE TABLE units (key TEXT PRIMARY KEY, result BLOB NOT NULL) WITHOUT ROWID")
        finally:
            connection.close()  # which moves what is in the log into the file
        publish(temporary, path)
        sync_folder(path.parent)
    except FileExistsError:
        pass  # another process was first
    except OSError as error:
        raise explained(error, path) from error
    finally:
        for leftover in path.parent.glob(temporary.name + "*"):
            leftover.unlink(missing_ok=True)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
