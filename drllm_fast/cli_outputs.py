"""Where a command is to write: whether it can, before minutes of work and not after."""

from __future__ import annotations

from pathlib import Path

import typer


def check_plot(path: Path) -> None:
    """typer.BadParameter, OSError or ImportError where no plot can be written."""
    from drllm_fast.report import FORMATS

    if path.suffix.lower() not in FORMATS:
        raise typer.BadParameter(f"{path}: the file name must end in one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise typer.BadParameter(f"{path}: is a folder; give a file name")
    new = not path.exists()
    try:
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('plotting needs matplotlib: pip install "drllm-fast[plot]"') from error
