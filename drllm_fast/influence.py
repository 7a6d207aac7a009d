"""Leaving out the blocks that change the hidden state least: a policy that needs no training.

Blocks are removed one by one. At each step the model reads a calibration text without the blocks removed so far, and of
the blocks left the one with the least influence goes next. With x, y [N, d] what enters and leaves a block at the N
tokens of the text, its influence is one of

    block-influence   mean over tokens of 1 - cos(x_t, y_t)                                (ShortGPT, arXiv 2403.03853)
    cka               1 - |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F), X and Y centred over tokens   (linear CKA, Kornblith et
                                                                                            al. 2019, arXiv 1905.00414)

ShortGPT ranks once; ranking again after each removal accounts for blocks that stand in for one another.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from drllm_fast.decoder import decoder_of, unwrap
from drllm_fast.policies import PromptBatch
from drllm_fast.router_reference import EXECUTE, SKIP

FORMAT = {"format": "drllm-fast static policy", "format_version": 1}


def block_influence(x: Tensor, y: Tensor) -> float:
    """Mean over tokens of 1 - cos(x_t, y_t) for x, y [N, d]; 0 for a block that only rescales, at most 2."""
    return float((1 - F.cosine_similarity(x.float(), y.float(), dim=-1)).mean())


def cka_distance(x: Tensor, y: Tensor) -> float:
    """1 - linear CKA of x, y [N, d], in fp64; 0 for a block that only rotates, rescales and shifts, at most 1.

    Where x or y is the same at every token, CKA is 0 / 0: the distance is 0 if both are, else 1.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # which Metal does not have
    x, y = (z - z.mean(dim=0) for z in (x.to(wide), y.to(wide)))
    if len(x) < x.shape[1]:  # |Y^T X|^2 = <X X^T, Y Y^T>: [N, N] matrices where those are the smaller ones
        gram_x, gram_y = x @ x.T, y @ y.T
        shared, own = (gram_x * gram_y).sum(), gram_x.norm() * gram_y.norm()
    else:
        shared, own = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    if own == 0:
        return 0.0 if not x.any() and not y.any() else 1.0
    return float(1 - shared / own)


CRITERIA: dict[str, Callable[[Tensor, Tensor], float]] = {"block-influence": block_influence, "cka": cka_distance}
MEASURED = ("prices", "elimination")  # other rankings, which are made elsewhere


class StaticPolicy:
    """One layer path for all prompts: all blocks but the first few of `order`, as many as the budget asks for.

    order       block numbers in the order of their removal, least influence first; it may be shorter than L
    num_layers  L
    budget      see the property
    criterion   what `order` was ranked by: a key of CRITERIA, 'prices' (`drllm_fast.training.price_lesson`) or
                'elimination' (`drllm_fast.training.elimination`)

    Raises TypeError or ValueError.
    """

    def __init__(
        self, order: Sequence[int], *, num_layers: int, budget: float, criterion: str = "block-influence"
    ) -> None:
        if criterion not in (*CRITERIA, *MEASURED):
            raise ValueError(f"criterion must be one of {', '.join((*CRITERIA, *MEASURED))}, got {criterion!r}")
        for value in (num_layers, *order):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"num_layers and the blocks of order must be integers, got {value!r}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if len(set(order)) != len(order) or not all(0 <= block < num_layers for block in order):
            raise ValueError(f"order must name blocks from 0 to {num_layers - 1}, each at most once, got {list(order)}")
        self.order = tuple(order)
        self.num_layers = num_layers
        self.criterion = criterion
        self.budget = budget

    @property
    def budget(self) -> float:
        """The share of the L blocks to run, above 0 and up to 1: round((1 - budget) L) blocks are skipped.

        When set: TypeError for what is no number; ValueError outside that range, where no block would be left, and
        where `order` is too short, which calibration with a lower budget mends.
        """
        return self._budget

    @budget.setter
    def budget(self, value: float) -> None:
        skipped = skipped_blocks(value, self.num_layers)
        if skipped > len(self.order):
            raise ValueError(
                f"budget {value} skips {skipped} of {self.num_layers} blocks, but only {len(self.order)} are ranked; "
                f"calibrate again with budget={value}, or ask for {1 - len(self.order) / self.num_layers:.3g} or more"
            )
        self._budget = float(value)

    @property
    def path(self) -> tuple[int, ...]:
        """How often each of the L blocks runs: 0 or 1."""
        skipped = set(self.order[: skipped_blocks(self.budget, self.num_layers)])
        return tuple(SKIP if block in skipped else EXECUTE for block in range(self.num_layers))

    def bind(self, model: nn.Module) -> None:
        """ValueError unless `model` has num_layers decoder layers."""
        layers = len(decoder_of(model).layers)
        if layers != self.num_layers:
            raise ValueError(
                f"this policy ranks {self.num_layers} blocks, the model has {layers}; use the model it was calibrated "
                "on, or StaticPolicy.calibrate(model, ...)"
            )

    def route(self, layer: int, prompts: PromptBatch) -> Tensor:
        """int8 [B, L], the whole plan at once: `path` for each row."""
        path = torch.tensor(self.path, dtype=torch.int8, device=prompts.hidden.device)
        return path.repeat(prompts.cu_seqlens.numel() - 1, 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as JSON."""
        data = {name: getattr(self, name) for name in ("order", "num_layers", "criterion", "budget")}
        Path(path).write_text(json.dumps(FORMAT | data) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StaticPolicy:
        """Read what `save` wrote. OSError for a file that is missing or no JSON, ValueError for other contents."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{path} is damaged: {error}; calibrate and save the policy again") from error
        try:
            if {key: data.pop(key) for key in FORMAT} != FORMAT:
                raise ValueError("another format or version")
            return cls(data.pop("order"), **data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no static policy that this version reads: {error!r}") from error

    @classmethod
    def calibrate(
        cls,
        model: nn.Module,
        tokenizer: Callable[[str], Any],
        texts: Iterable[str] | None = None,
        *,
        budget: float,
        criterion: str = "block-influence",
        max_tokens: int = 2048,
        progress: bool = True,
    ) -> StaticPolicy:
        """Rank blocks of an unrouted transformers model until `budget` is met, greedily as described above.

        tokenizer   as the model's own: tokenizer(text)["input_ids"] is a list of ids
        texts       prompts like those to come; by default a bundled English text of about 2,000 tokens. Each is a
                    sequence of its own; the first `max_tokens` tokens of them all are read, once for each block removed
        max_tokens  2 L max_tokens d numbers in the model's dtype are held in memory, on the model's device

        The model is left as it was, whatever happens. Raises ValueError for a bad argument, a model that is routed, and
        hidden states that are not finite; NotImplementedError for a model without a list of decoder layers.
        """
        decoder = _unrouted_decoder(model, criterion)
        layers = list(decoder.layers)
        removals = skipped_blocks(budget, len(layers))
        prompts = _prompts(decoder, tokenizer, calibration_texts() if texts is None else texts, max_tokens)

        order: list[int] = []
        for _ in tqdm(range(removals), desc=f"ranking blocks by {criterion}", disable=not progress):
            scores = _scores(decoder, prompts, criterion, removed=order)
            order.append(min(scores, key=scores.__getitem__))
        return cls(order, num_layers=len(layers), budget=budget, criterion=criterion)

    def __repr__(self) -> str:
        return (
            f"StaticPolicy(order={self.order}, num_layers={self.num_layers}, budget={self.budget}, "
            f"criterion={self.criterion!r})"
        )


def influences(
    model: nn.Module,
    tokenizer: Callable[[str], Any],
    texts: Iterable[str] | None = None,
    *,
    criterion: str = "block-influence",
    max_tokens: int = 2048,
) -> list[float]:
    """Influence of each of the L blocks, none of them removed. Arguments and errors are those of
    StaticPolicy.calibrate."""
    decoder = _unrouted_decoder(model, criterion)
    prompts = _prompts(decoder, tokenizer, calibration_texts() if texts is None else texts, max_tokens)
    scores = _scores(decoder, prompts, criterion, removed=())
    return [scores[block] for block in range(len(decoder.layers))]


def skipped_blocks(budget: float, num_layers: int) -> int:
    """How many of `num_layers` blocks a budget skips: round((1 - budget) num_layers). TypeError or ValueError."""
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"budget must be a number above 0 and up to 1, got {budget!r}")
    if not 0 < budget <= 1:  # NaN, too
        raise ValueError(f"budget must be above 0 and up to 1 (0.8 runs 80 % of the blocks), got {budget}")
    skipped = round((1 - budget) * num_layers)
    if skipped == num_layers:
        raise ValueError(f"budget {budget} leaves none of {num_layers} blocks; give {1 / num_layers:.3g} or more")
    return skipped


def calibration_texts() -> list[str]:
    """The passages of the bundled calibration text."""
    file = importlib.resources.files("drllm_fast") / "data" / "calibration.txt"
    return [passage.strip() for passage in file.read_text(encoding="utf-8").split("\n----\n")]


def _unrouted_decoder(model: nn.Module, criterion: str) -> Any:
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    top = unwrap(model)
    decoder = decoder_of(top)
    if any(getattr(module, "routing", None) is not None for module in (top, decoder)):
        raise ValueError("the model is routed; call model.disable_dynamic_routing() before calibration")
    return decoder


def _scores(decoder: Any, prompts: list[Tensor], criterion: str, removed: Sequence[int]) -> dict[int, float]:
    """Influence of each remaining block. ValueError where it is not finite."""
    states = _states(decoder, prompts, removed)
    scores = {block: CRITERIA[criterion](x, y) for block, (x, y) in states.items()}
    for block, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(
                f"the hidden states at block {block} are not finite; look for NaN in the model's weights, and "
                "use bfloat16 or float32 if the model overflows float16"
            )
    return scores


def _prompts(decoder: Any, tokenizer: Callable[[str], Any], texts: Iterable[str], max_tokens: int) -> list[Tensor]:
    """The first `max_tokens` tokens of the texts as prompts [1, n], none longer than the model's positions."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string; give [text]")
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
    device = decoder.get_input_embeddings().weight.device
    longest = getattr(decoder.config, "max_position_embeddings", None) or max_tokens
    prompts: list[Tensor] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:max_tokens]
        max_tokens -= len(ids)
        prompts += [torch.tensor([ids[i : i + longest]], device=device) for i in range(0, len(ids), longest)]
        if not max_tokens:
            break
    if sum(prompt.numel() for prompt in prompts) < 2:
        raise ValueError("texts hold fewer than 2 tokens; give some text, or None for the bundled one")
    return prompts


def _states(decoder: Any, prompts: list[Tensor], removed: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """What enters and leaves each remaining block, x and y [N, d], over all tokens of the prompts.

    Prompts run one at a time, so that there is no padding that could enter the statistics.
    """
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def observe(block: int, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x, y = _entering(args, kwargs), output[0] if isinstance(output, tuple) else output
        pairs.setdefault(block, []).append((x.flatten(0, -2), y.flatten(0, -2)))

    def skip(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        x = _entering(args, kwargs)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    with evaluating(decoder), torch.no_grad():
        handles = []
        try:
            for block, layer in enumerate(decoder.layers):
                hook = skip if block in removed else partial(observe, block)
                handles.append(layer.register_forward_hook(hook, with_kwargs=True))
            for prompt in prompts:
                decoder(input_ids=prompt, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    return {block: (torch.cat([x for x, _ in p]), torch.cat([y for _, y in p])) for block, p in pairs.items()}


def _entering(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each submodule gets its own mode back, for they may differ."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training
