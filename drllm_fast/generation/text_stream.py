"""Tokens into text as they come, and the end of an answer at a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens before a new one that its text may depend on: accents that join, spaces that a first word loses.
OVERLAP = 6


class TextStream:
    """The text of one answer. `push` returns what is certain to be next; together with what `finish` returns, that is
    the whole text.

    A character of several tokens comes when it is complete, and what may be the beginning of a stop text when it is
    known not to be one. `stopped` once a stop text is complete: it and what follows do not belong to the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.stopped = False
        self.text = ""  # handed out
        self._held = ""  # decoded, kept back
        self._from = 0  # the tokens from here on are decoded again with a new one
        self._known = ""  # their text

    def push(self, token: int) -> str:
        self.tokens.append(token)
        whole = self._decode(self.tokens[self._from :])
        if whole.endswith("\ufffd") or not whole.startswith(self._known):
            return ""
        new = whole[len(self._known) :]
        if len(self.tokens) - self._from > 2 * OVERLAP:
            self._from = len(self.tokens) - OVERLAP
            whole = self._decode(self.tokens[self._from :])
        self._known = whole
        return self._add(new)

    def finish(self) -> str:
        """What was kept back and belongs to the text after all."""
        if self.stopped:
            return ""
        whole, had = self._decode(self.tokens), self.text + self._held
        rest = self._add(whole[len(had) :]) if whole.startswith(had) else ""
        if not self.stopped:
            rest += self._held
            self.text += self._held
            self._held = ""
        return rest

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _add(self, new: str) -> str:
        self._held += new
        ends = [at for at in (self._held.find(stop) for stop in self.stop) if at >= 0]
        if ends:
            self.stopped = True
            out, self._held = self._held[: min(ends)], ""
        else:
            keep = max((_overlap(self._held, stop) for stop in self.stop), default=0)
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
