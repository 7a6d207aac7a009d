"""Files that appear complete or not at all, also on disks shared by several machines."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PREFIX = ".tmp-"  # of files being written; a killed process leaves one behind
KEPT_SECONDS = 24 * 3600.0  # no write takes as long, and clocks of machines that share a disk differ by less

_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EROFS: "choose another folder",
    errno.EACCES: "make the folder writable or choose another one",
    errno.EPERM: "make the folder writable or choose another one",
}


@contextmanager
def written(path: Path, *, once: bool = False) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` when the block ends well, synchronised to disk; else it is removed.

    once: FileExistsError, and the file that is there stays, if `path` exists by then.

    Raises OSError that says what to do, for a full or read-only disk.
    """
    temporary = path.with_name(PREFIX + uuid.uuid4().hex)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if once:
            publish(temporary, path)
        else:
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def explained(error: OSError, path: Path) -> OSError:
    """`error`, or one that says what to do about it where writing `path` failed for lack of room or of permission."""
    if error.errno not in _ADVICE:
        return error
    return OSError(
        f"cannot write {path}: {os.strerror(error.errno)}. What is stored already stays; {_ADVICE[error.errno]} and "
        "run the same command again"
    )


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name. FileExistsError if another process was first."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # No hard links on this disk. Two processes may both get here, and the later one's file stays.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks cannot
            raise
    finally:
        os.close(descriptor)


def clean(folder: Path) -> None:
    """Remove what processes killed more than a day ago were writing."""
    for leftover in folder.glob(PREFIX + "*"):
        try:
            if time.time() - leftover.stat().st_mtime > KEPT_SECONDS:
                leftover.unlink()
        except OSError:  # another process was first, or may not be disturbed
            continue
