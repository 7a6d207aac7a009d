"""Prompts to train routers on, with what they are to choose: what searches stored, as examples.

best   the shortest path that keeps or repairs the answer, which Dr.LLM (arXiv 2510.12773) trains on
soft   per block the shares of skip, execute and repeat among all correct paths of the prompt, where path p weighs
       exp(-visits(p) / temperature): at temperature 1 a path that is a visit shorter weighs 2.7 times as much
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drllm_fast import fingerprint
from drllm_fast.decoder import decoder_of
from drllm_fast.router_reference import CLASSES
from drllm_fast.search.paths import LayerPath, decode, dense_path, visits
from drllm_fast.search.tokens import encode_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from drllm_fast.search.store import Store
    from drllm_fast.search.unit import UnitResult

TARGETS = ("best", "soft")
Probabilities = tuple[float, float, float]  # of skip, execute and repeat


@dataclass(frozen=True)
class Example:
    """One prompt of a training set.

    id, task, level   as in the search that found it; `task` and `level` make the groups of robust training
    tokens            the prompt as the model sees it, chat template included: what the routers read
    path              [L] the label, and the path that the frozen model runs while the windows are made
    targets           [L][3] probabilities of skip, execute and repeat to learn instead of `path`; None: one-hot of it
    grader            who judged the answers of its search
    """

    id: str
    task: str
    level: int | None
    tokens: tuple[int, ...]
    path: LayerPath
    targets: tuple[Probabilities, ...] | None = None
    grader: str | None = None

    @property
    def group(self) -> str:
        """`task/level`, or the task alone where it has no levels."""
        return self.task if self.level is None else f"{self.task}/{self.level}"


def load_examples(
    stores: Sequence[str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module | None = None,
    num_layers: int | None = None,
    targets: Literal["best", "soft"] = "best",
    temperature: float = 1.0,
    only_kept: bool = True,
    levels: Sequence[int] | str | None = None,
    limit: int | None = None,
) -> list[Example]:
    """The prompts of one or more searches with what they are to choose, in the order of the stores and of their keys.

    stores       folders that `drllm-fast search` wrote
    tokenizer    the model's own
    model        the one that the paths were searched for, compared with the stores' fingerprints; or else
    num_layers   L, where the model is not at hand
    targets      "best" or "soft", see above; the `path` of an example is the best one either way
    temperature  of the soft targets, in visits
    only_kept    leave out prompts for which the search found nothing better than the dense path; otherwise they are
                 examples of the dense path
    levels       only prompts of these levels: [1, 2], or '1-2', or '1,4'
    limit        the first so many examples of each store

    Raises FileNotFoundError for a folder without a search, OSError for a damaged one, ValueError for a search of
    another model, for paths that are none of the model's, for a prompt in two stores, and if no example is left.
    """
    from drllm_fast.search.store import read_store
    from drllm_fast.search.tasks import parse_levels

    if (model is None) == (num_layers is None):
        raise TypeError("give either the model or num_layers")
    if isinstance(stores, str | Path) or not stores:
        raise ValueError(f"stores must be a list of one or more folders of searches, got {stores!r}")
    if targets not in TARGETS:
        raise ValueError(f"targets must be one of {', '.join(TARGETS)}, got {targets!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number of visits, got {temperature}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    wanted = parse_levels(levels) if isinstance(levels, str) else levels
    layers = num_layers if model is None else len(decoder_of(model).layers)

    examples: list[Example] = []
    homes: dict[str, int] = {}  # in which store a prompt was met
    searched = kept = 0
    for number, folder in enumerate(map(Path, stores)):
        found: list[Example] = []
        with read_store(folder) as store:
            check_model(store, model)
            for result in store.results():
                searched, kept = searched + 1, kept + result.kept
                home = homes.setdefault(result.key.prompt, number)
                if home != number:
                    raise ValueError(
                        f"the prompt of {result.key.task}/{result.key.item} was searched in {stores[home]} and in "
                        f"{folder}; train on one of the two searches"
                    )
                if (result.kept or not only_kept) and (wanted is None or result.level in wanted):
                    if limit is None or len(found) < limit:
                        found.append(_example(result, folder, layers, tokenizer, targets, temperature))
        examples += found
    if not examples:
        of_levels = "" if wanted is None else f" and the levels {sorted(wanted)}"
        raise ValueError(
            f"no example: of {searched} searched prompts {kept} were kept, and nothing is left with "
            f"only_kept={only_kept}{of_levels}; search more prompts, or with more simulations"
        )
    return examples


def targets_of(examples: Sequence[Example]) -> Tensor:
    """What routers are to learn: the paths, int8 [N, L], or, if an example has probabilities, those, float32
    [N, L, 3]. On the CPU."""
    paths = torch.tensor([example.path for example in examples], dtype=torch.int8, device="cpu")
    if all(example.targets is None for example in examples):
        return paths
    probabilities = F.one_hot(paths.long(), CLASSES).float()
    for row, example in enumerate(examples):
        if example.targets is not None:
            probabilities[row] = torch.tensor(example.targets)
    return probabilities


def training_set_hash(examples: Sequence[Example]) -> str:
    """16 hex digits that change with any prompt, path or target, and not with the order of the examples."""
    lines = sorted(json.dumps(asdict(example), sort_keys=True) for example in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_model(store: Store, model: nn.Module | None) -> None:
    if model is None:
        return
    try:
        fingerprint.check(model, store.manifest.fingerprint)
    except ValueError as error:
        raise ValueError(
            f"{store.folder} holds paths of {store.manifest.model}: {error}. Train routers for the model that was "
            "searched, or search this one"
        ) from error


def _example(
    result: UnitResult, folder: Path, layers: int, tokenizer: PreTrainedTokenizerBase, targets: str, temperature: float
) -> Example:
    path, soft = dense_path(layers), None
    if result.kept:
        path = stored_path(result.best, result, folder, layers)
        if targets == "soft":
            pairs = zip(result.paths, result.correct, strict=True)
            soft = soft_targets(
                [stored_path(text, result, folder, layers) for text, right in pairs if right], temperature
            )
    key = result.key
    return Example(key.item, key.task, result.level, stored_prompt(result, tokenizer), path, soft, result.grader)


def stored_prompt(result: UnitResult, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of a searched prompt, which the routers read."""
    return tuple(encode_context(tokenizer, result.prompt, choices=result.choices is not None))


def soft_targets(paths: Sequence[LayerPath], temperature: float) -> tuple[Probabilities, ...]:
    """[L][3] the shares of skip, execute and repeat among the paths, path p with the weight
    exp(-visits(p) / temperature)."""
    lengths = torch.tensor([visits(path) for path in paths], dtype=torch.float64, device="cpu")
    weights = (-lengths / temperature).softmax(0)
    classes = F.one_hot(torch.tensor(paths, device="cpu"), CLASSES).double()  # [P, L, 3]
    return tuple(map(tuple, torch.einsum("p,plc->lc", weights, classes).tolist()))


def stored_path(text: str, result: UnitResult, folder: Path, layers: int) -> LayerPath:
    where = f"{folder}, {result.key.task}/{result.key.item}"
    try:
        path = decode(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; the store is damaged, search again") from error
    if len(path) != layers:
        raise ValueError(f"{where}: a path of {len(path)} blocks, the model has {layers}; take the model searched")
    return path
