"""Layer paths as a search sees them, and the edits that lead from one to the next.

A path is a tuple of L integers: 0 skip, 1 execute, 2 repeat. An edit changes blocks that still run once, so that the
order of edits does not matter and every path is reached by a set of edits of the dense path.
"""

from __future__ import annotations

from collections.abc import Sequence

from drllm_fast.router_reference import EXECUTE, REPEAT, SKIP

LayerPath = tuple[int, ...]


def dense_path(num_layers: int) -> LayerPath:
    return (EXECUTE,) * num_layers


def visits(path: Sequence[int]) -> int:
    """How many blocks a path runs, repeats counted twice; L for the dense path, at most 2L."""
    return sum(path)


def encode(path: Sequence[int]) -> str:
    """One digit a block, as it is stored: '110211'."""
    return "".join(map(str, path))


def decode(text: str) -> LayerPath:
    """ValueError for anything but the digits 0, 1 and 2."""
    if not text or set(text) - set("012"):
        raise ValueError(
            f"not a layer path: {text!r:.80}; expected one digit for each block: 0 skip, 1 execute, 2 repeat"
        )
    return tuple(map(int, text))


def edits(path: LayerPath) -> list[LayerPath]:
    """The paths one edit away: skip one block or two neighbours, repeat one block, of those that run once."""
    found = []
    for block, times in enumerate(path):
        if times != EXECUTE:
            continue
        found.append(path[:block] + (SKIP,) + path[block + 1 :])
        if block + 1 < len(path) and path[block + 1] == EXECUTE:
            found.append(path[:block] + (SKIP, SKIP) + path[block + 2 :])
        found.append(path[:block] + (REPEAT,) + path[block + 1 :])
    return found
