"""The unit of a search: one prompt, one model, one configuration, one seed; what goes in and what comes out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One prompt to search paths for.

    id       unique within its task
    prompt   the text the model sees before an answer, ready made (few-shot examples and chat template included)
    choices  continuations of the prompt, each with its leading space; None for a free answer
    answer   index of the right choice, or the right answer's text
    aliases  further accepted answers, of a free answer
    stop     texts at which a free answer ends, and how many tokens it may have
    level    difficulty, where the task has levels
    """

    id: str
    task: str
    prompt: str
    choices: tuple[str, ...] | None
    answer: int | str
    aliases: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 16
    level: int | None = None


@dataclass(frozen=True)
class SearchConfig:
    """What decides a unit's result, beside its prompt, the model and the seed. See `drllm_fast.search.mcts` and
    `drllm_fast.search.rewards` for what the values mean."""

    method: str = "mcts"
    simulations: int = 50
    reward: str = "exact"
    exploration: float = 1.8
    length_penalty: float = 3.0
    random_child: float = 0.1
    max_length: float = 2.0  # visits, as a multiple of L
    early_stop: bool = True
    leaves: int = 4  # simulated at once, under virtual loss
    prior: str = "none"
    grader: str = "exact"
    agree: int = 3  # of the reward "agreement": as many paths must give an answer for it to count
    control: bool = True  # where the dense path answers wrongly, search towards another wrong answer as well
    probes: int = 8  # single edits drawn at random, beside the search, for what a static path would do
    max_new_tokens: int | None = None  # of free answers, instead of the item's own
    options: dict[str, Any] = field(default_factory=dict)  # of the method

    def hash(self) -> str:
        """12 hex digits that change with any value."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class UnitKey:
    """What makes a unit the same one: two results with one key are of the same search."""

    task: str
    item: str  # the item's id
    prompt: str  # hash of prompt, choices and answer
    model: str  # hash of the model's fingerprint
    config: str  # SearchConfig.hash()
    seed: int

    def text(self) -> str:
        return "|".join((self.task, self.item, self.prompt, self.model, self.config, str(self.seed)))


@dataclass
class UnitResult:
    """What a search found for one unit. Every list has an entry for each path that was tried, in order; the first is
    the dense path."""

    key: UnitKey
    prompt: str
    choices: list[str] | None
    answer: str  # the right one; an index as text where there are choices
    level: int | None
    paths: list[str]  # as `paths.encode` writes them
    rewards: list[float]
    correct: list[bool]
    predictions: list[str]  # the choice taken, or the text written
    scores: list[list[float]] | None  # log-likelihoods, by path and choice
    best: str  # the path to train on; the dense one where nothing better was found
    kept: bool  # whether `best` repairs the dense path's answer, or preserves a right one and is shorter
    control_target: str | None  # the wrong answer of the control; None where there was no control
    control_reached: bool | None  # whether the same search reached it
    probes: list[str]  # single edits, drawn without looking at any outcome
    probes_correct: list[bool]
    forwards: int  # paths run, those of the control and the probes included
    visits: int  # of blocks, run for all of these paths together; its share, where prompts shared forwards
    visits_alone: int  # visits of the same paths one by one
    grader: str
    seconds: float


def prompt_hash(item: Item) -> str:
    """16 hex digits of what the search depends on in an item."""
    parts = [item.prompt, item.choices, item.answer, item.aliases, item.stop, item.max_new_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
