"""States at path prefixes, kept between forwards: a path that differs from a known one at block i costs from i on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from drllm_fast.search.path_tree import Prefix
from drllm_fast.search.paths import LayerPath


class PrefixStore:
    """At most `max_bytes` of states, least recently used first out.

    A prefix is as recent as whatever extends it, so that a state's ancestors, which hold the keys and values of its
    earlier blocks, outlive it.
    """

    def __init__(self, max_bytes: int):
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be 0 (keep nothing) or more, got {max_bytes}")
        self.max_bytes, self.bytes = max_bytes, 0
        self._kept: OrderedDict[tuple[Hashable, LayerPath], Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def deepest(self, prompt: Hashable, path: LayerPath) -> Prefix | None:
        """The longest known prefix of `path`, or None."""
        if not self._kept:
            return None
        for depth in range(len(path), 0, -1):
            found = self._kept.get((prompt, path[:depth]))
            if found is not None:
                return found
        return None

    def keep(self, prompts: Sequence[Hashable], fresh: Sequence[Prefix], used: Sequence[Prefix]) -> None:
        """Keep the `fresh` states of a forward of `prompts`, copied out of its tensors: the shallowest first where not
        all have room, since most paths share those. `used`: the whole paths it ran; they and all they extend are recent
        now. All prompts at once: kept one by one, a prompt would push out what the next one's states extend."""
        room, chosen = self.max_bytes, []
        for prefix in sorted(fresh, key=lambda p: len(p.path)):
            room -= prefix.bytes()
            if room < 0:
                break
            chosen.append(prefix)
        for prefix in chosen:
            prefix.hidden = prefix.hidden.clone()
            prefix.slots = tuple((k.clone(), v.clone()) for k, v in prefix.slots)
            self._kept[prompts[prefix.prompt], prefix.path] = prefix
            self.bytes += prefix.bytes()
        for leaf in used:
            at, prompt = leaf, prompts[leaf.prompt]
            while at.path:
                if (prompt, at.path) in self._kept:
                    self._kept.move_to_end((prompt, at.path))
                at = at.parent
        while self.bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= oldest.bytes()

    def forget(self, prompt: Hashable) -> None:
        """Drop all that is known of a prompt."""
        for key in [key for key in self._kept if key[0] == prompt]:
            self.bytes -= self._kept.pop(key).bytes()

    def clear(self) -> None:
        self._kept.clear()
        self.bytes = 0
