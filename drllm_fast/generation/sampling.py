"""How tokens are chosen: what may be asked for each prompt, and the choice itself, for all rows of a batch at once.

A row's choice depends on its own scores, its seed and the number of the token alone, never on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

MAX_STOP = 16


@dataclass(frozen=True)
class Sampling:
    """How one prompt is answered.

    max_new_tokens  how long the answer may be; where it would leave the model's positions, as far as they go
    temperature     0: the most probable token (greedy). Else scores are divided by it before one is drawn
    top_k           of so many most probable tokens alone; 0: of all
    top_p           of the fewest most probable tokens that have this probability together, after top_k
    seed            of the draws: the same prompt and seed give the same answer, whatever else is running
    stop            texts that end the answer; they do not belong to it
    ignore_eos      go on after the end-of-sequence token

    Raises TypeError or ValueError.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("top_k", 0), ("seed", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r:.80}")
            if low is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r:.80}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r:.80}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
            raise TypeError(f"stop must be texts, got {self.stop!r:.80}")
        if not all(stop) or len(stop) > MAX_STOP:
            raise ValueError(f"stop must be at most {MAX_STOP} texts, none of them empty, got {self.stop!r:.80}")
        object.__setattr__(self, "stop", tuple(stop))


def choose_tokens(logits: Tensor, samplings: Sequence[Sampling], numbers: Sequence[int]) -> Tensor:
    """int64 [B] on the device of logits [B, V]: the token that each row chooses; numbers[b] counts row b's tokens.

    Drawing inverts the distribution function at `uniform(seed, number)`, over the tokens in the order of their scores,
    of equal ones the lower token first. Where scores give no distribution (NaN, an infinity that is no mask) a row
    takes what is greedy there: NaN counts as the largest.
    """
    chosen = logits.argmax(-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        some = [samplings[row] for row in drawn]
        u = uniform([s.seed for s in some], [numbers[row] for row in drawn])
        tokens, sound = _draw(logits.index_select(0, index).float(), some, torch.from_numpy(u).to(logits.device))
        chosen[index] = torch.where(sound, tokens, chosen[index])
    return chosen


def _draw(logits: Tensor, samplings: Sequence[Sampling], u: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens int64 [n], and bool [n]: where there was a distribution to draw from."""

    def column(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device).unsqueeze(1)

    vocabulary = logits.shape[1]
    depths = [min(s.top_k or vocabulary, vocabulary) for s in samplings]
    deepest = max(depths)
    if deepest < vocabulary:
        tokens = _most_probable(logits, deepest)
        scores = logits.gather(1, tokens)
    else:
        scores, tokens = logits.sort(dim=1, descending=True, stable=True)
    # The maximum goes first, since a low temperature would overflow; none may be 0 or infinite in fp32.
    temperatures = [min(max(float(s.temperature), 1e-30), 1e30) for s in samplings]
    scores = (scores - logits.amax(1, keepdim=True)) / column(temperatures, torch.float32)
    place = torch.arange(scores.shape[1], device=logits.device)
    top_k = column(depths, torch.int64)
    p = scores.masked_fill(place >= top_k, -torch.inf).softmax(1, dtype=torch.float64)
    before = p.cumsum(1) - p
    p = p.masked_fill(before >= column([s.top_p for s in samplings], torch.float64), 0)
    below = p.cumsum(1)
    # The first place whose cumulated probability exceeds u of the whole; never one that has none.
    at = (below <= u.unsqueeze(1) * below[:, -1:]).sum(1)
    at = torch.minimum(at, (p > 0).sum(1) - 1).clamp(min=0)
    return tokens.gather(1, at.unsqueeze(1)).squeeze(1), below[:, -1].isfinite()


def _most_probable(scores: Tensor, k: int) -> Tensor:
    """int64 [n, k], in order. `topk` leaves open which of equal scores it takes, and bf16 has many: a row's choice
    would depend on how deep its neighbours look."""
    bits = (scores + 0.0).view(torch.int32)  # no -0.0
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    last = scores.shape[1] - 1
    keys = (rising << 32) | (last - torch.arange(last + 1, device=scores.device))
    return last - (keys.topk(k, sorted=True).values & 0xFFFFFFFF)


def uniform(seeds: Sequence[int], numbers: Sequence[int]) -> np.ndarray:
    """float64 [B] in [0, 1): the numbers[b]-th draw of the stream seeds[b].

    SplitMix64 (Steele, Lea and Flood, 2014) of a counter; its top 53 bits."""

    def mixed(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    seed = np.array([s & (2**64 - 1) for s in seeds], dtype=np.uint64)
    number = np.array(numbers, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = mixed(mixed(seed + golden) + (number + np.uint64(1)) * golden)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
