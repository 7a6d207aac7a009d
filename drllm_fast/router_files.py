"""A router checkpoint: a folder with `config.json`, `routers.safetensors` and the card `README.md`.

Nothing else is read, and nothing is ever unpickled. The config says in words what the tensors mean (pooling rule,
order of the classes); a checkpoint that means something else is refused.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.hub_mixin import MixinInfo
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from drllm_fast.router_reference import CLASSES

CONFIG, WEIGHTS = "config.json", "routers.safetensors"
SETTINGS = (
    "num_layers", "hidden_size", "router_size", "windows", "knob", "base_model", "calibration", "margin",
    "guard_radius", "training_set", "grader",
)  # fmt: skip

# What the tensors mean. A reader that does not know a value must not guess.
MEANING = {
    "format": "drllm-fast routers",
    "format_version": 1,
    "pooling": "mean of min(windows, n) windows of n // min(windows, n) tokens, rest dropped; logits averaged",
    "classes": ["skip", "execute", "repeat"],
}

CARD = """---
{{ card_data }}
---

# Layer routers for {{ base_name }}

For each of the {{ num_layers }} layers of the frozen base model a small router decides, once for each prompt, whether
the layer is skipped, executed, or executed twice, by the method of [Dr.LLM]({{ paper_url }}). This folder holds the
routers only, {{ parameters }} parameters; the base model is loaded as usual and its weights are not changed.

```python
import drllm_fast
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{{ base_name }}")
model.enable_dynamic_routing("path/or/id/of/this/checkpoint"{{ ", budget=" ~ budget if budget else "" }})
```
{% if budget %}
The budget is the mean share of the base model's layers that prompts like those of the calibration run. It may be any in
the range below, and changed at any time with `model.routing.budget = ...`; without one the routers alone decide.
{% endif %}
| | |
|---|---|
| base model | {{ base_name }}{{ " (recognised by its weights; another one is refused)" if base_model else "" }} |
| router | windowed means of the hidden states, at most {{ windows }} windows; Linear({{ hidden_size }}, {{ router_size }}), GELU, Linear({{ router_size }}, 3) |
| classes | skip, execute, repeat |
| knob | {{ knob }} (-0.5: the routers alone) |
| budgets | {{ budgets }} |
| margin | {{ margin }}: how sure a router must be to leave "execute" |
| guard | {{ "none" if guard_radius is none else "prompts unlike the training prompts run every layer once" }} |
| training set | {{ training_set or "not recorded" }} |
| grader | {{ grader or "not recorded" }} |
| written by | drllm-fast {{ package_version }} |
"""  # noqa: E501  a table's row is one line


def bundled_routers() -> dict[str, Path]:
    """The router checkpoints that come with this package: name, and folder where it lies."""
    root = Path(str(files("drllm_fast"))) / "data" / "routers"
    return {config.parent.name: config.parent for config in sorted(root.glob(f"*/{CONFIG}"))}


def locate(name: str, **hub: Any) -> tuple[Path, Path]:
    """The files of a checkpoint: in the folder `name`, else the one bundled by that name, else fetched from the Hub id
    `name`. OSError says what is missing.

    A folder comes first, as it does everywhere in Hugging Face's libraries: what the user has made is not hidden by
    what a later version of this package bundles.
    hub: keyword arguments of huggingface_hub.hf_hub_download.
    """
    if not os.path.isdir(name):
        name = str(bundled_routers().get(name, name))
    if not os.path.isdir(name):
        return _fetch(name, CONFIG, hub), _fetch(name, WEIGHTS, hub)
    for file in (CONFIG, WEIGHTS):
        if not os.path.isfile(os.path.join(name, file)):
            found = ", ".join(sorted(os.listdir(name))[:8]) or "nothing"
            raise FileNotFoundError(
                f"{os.path.join(name, file)} is missing (the folder has {found}); a router checkpoint is written by "
                "LayerRouters.save_pretrained, and pickle files are never read"
            )
    return Path(name, CONFIG), Path(name, WEIGHTS)


def read_config(file: Path) -> dict[str, Any]:
    """The constructor's arguments. OSError for one that is not JSON, ValueError for other contents."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, not UTF-8
        raise OSError(f"{file} is damaged: {error}; fetch or write the checkpoint again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, expected the config of a router checkpoint")
    for key, known in MEANING.items():
        if config.get(key) != known:
            raise ValueError(
                f"{file}: {key} is {config.get(key)!r:.120}; this version of drllm-fast reads {known!r} only. Is it a "
                "router checkpoint, and of which version?"
            )
    missing = [name for name in SETTINGS if name not in config]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; write the checkpoint again")
    return {name: config[name] for name in SETTINGS}


def read_weights(file: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """fp32 tensors of the shapes that the config asks for, without those of a guard if it asks for none. OSError for a
    damaged file, ValueError for others."""
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} is damaged or unreadable: {error}; fetch or write the checkpoint again") from error
    layers, hidden_size, width = (config[name] for name in ("num_layers", "hidden_size", "router_size"))
    expected = {
        "w1": [layers, width, hidden_size],
        "b1": [layers, width],
        "w2": [layers, CLASSES, width],
        "b2": [layers, CLASSES],
    }
    if config["guard_radius"] is not None:
        prototypes = weights.get("prototypes")
        count = len(prototypes) if prototypes is not None and prototypes.ndim else 0
        expected |= {"prototypes": [max(count, 1), hidden_size], "centre": [hidden_size]}
    else:  # a checkpoint is given a guard file by file, the weights first
        weights = {name: tensor for name, tensor in weights.items() if name not in ("prototypes", "centre")}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        raise ValueError(f"{file} holds {found}, but the config beside it asks for {expected}")
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{file}: {name} ({tensor.dtype}) must be floating and finite; train the routers again")
    return {name: tensor.to(torch.float32) for name, tensor in weights.items()}


def write(folder: Path, settings: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write config and weights; the weights first, so that a folder with a config is complete."""
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in weights.items()}
    config = json.dumps(MEANING | settings | {"package_version": package_version()}, indent=2)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")


def card(settings: dict[str, Any], info: MixinInfo, **extra: Any) -> ModelCard:
    """The checkpoint's README.md."""
    name = settings["base_model"]["name"] if settings["base_model"] else "a model of these sizes"
    data = info.model_card_data.to_dict()
    if "/" in name and settings["base_model"]:  # an id on the Hub; anything else would be a dead link there
        data["base_model"] = name
    layers, hidden_size, width = (settings[key] for key in ("num_layers", "hidden_size", "router_size"))
    facts = settings | {
        "base_name": name,
        "budgets": _budgets(settings["calibration"]),
        "budget": _budget(settings["calibration"]),
        "parameters": f"{layers * (width * (hidden_size + 1 + CLASSES) + CLASSES):,}",
        "paper_url": info.paper_url,
        "package_version": package_version(),
    }
    return ModelCard.from_template(ModelCardData(**data), template_str=info.model_card_template, **(facts | extra))


def _budgets(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return "not calibrated"
    return f"{calibration['budgets'][0]:.3g} to {calibration['budgets'][-1]:.3g} of the layers (`budget=...`)"


def _budget(calibration: dict[str, Any] | None) -> str | None:
    """One that may be asked for, as an example: 0.9 if it is in the table."""
    if calibration is None:
        return None
    low, *_, high = [calibration["budgets"][0], *calibration["budgets"]]
    return f"{min(max(low, 0.9), high):g}"


def package_version() -> str:
    try:
        return version("drllm-fast")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _fetch(name: str, file: str, hub: dict[str, Any]) -> Path:
    try:
        return Path(hf_hub_download(name, file, **hub))
    except Exception as error:  # not all are OSErrors: bad ids are ValueErrors, and the HTTP client has its own
        bundled = ", ".join(bundled_routers()) or "none"
        raise OSError(
            f"no router checkpoint {name!r}: it is not a folder here, not bundled (those are: {bundled}), and {file} "
            f"of that id cannot be had from the Hugging Face Hub ({type(error).__name__}: {error}). Check the "
            "spelling, the connection, and for a private one the token"
        ) from error
