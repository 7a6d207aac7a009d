"""The model of a command: what `--model`, `--dtype` and `--device` mean."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

SMOLLM2 = "smollm2-135m-instruct"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def check_model(name: str) -> None:
    """What can be said of `--model` before anything heavy is loaded. ValueError for a folder that holds no model."""
    if name.lower() == SMOLLM2:
        return
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/")):
            raise ValueError(f"--model {name}: no such folder")
        return
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ValueError(f"--model {name}: the folder has no config.json")
    if not any(any(folder.glob(kind)) for kind in ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")):
        raise ValueError(f"--model {name}: the folder has no tokenizer (tokenizer.json, tokenizer_config.json ...)")


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """A status line in place of the libraries' bars and retry warnings, and one line for a name that nobody knows."""
    from huggingface_hub.utils import logging
    from rich.console import Console

    from drllm_fast.smollm2 import _quiet_transformers

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with Console(stderr=True).status(f"Loading {name}"), _quiet_transformers():
            yield
    except OSError as error:
        if "/" in name or Path(name).is_dir():
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"--model {name}: no such folder, and not found on the Hub ({reason}); the bundled model is {SMOLLM2}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def load_model(name: str, dtype: Dtype, device: str) -> tuple[Any, Any]:
    """The model, in eval mode on `device`, and its tokenizer, set to pad on the left."""
    import torch

    wanted = "auto" if dtype is Dtype.auto else getattr(torch, dtype.value)
    if name.lower() == SMOLLM2:
        from drllm_fast.smollm2 import load_smollm2

        model, tokenizer = load_smollm2(torch.bfloat16 if wanted == "auto" else wanted)
        return model.to(device), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=wanted)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return model.to(device).eval(), tokenizer


def bfloat16_units(device: str) -> bool:
    """Whether a device computes in bfloat16; others emulate it, a CPU at a fraction of float32's speed."""
    import torch

    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.10
    return any("bf16" in name and there is True for name, there in capabilities.items())


def find_device(name: str) -> str:
    """The device to run on. ValueError for one that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", name):
        raise ValueError(f"--device {name}: write auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return name
