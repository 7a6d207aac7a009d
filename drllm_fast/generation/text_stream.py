"""Tokens into text as they come, and the end of an answer at a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens before a new one that its text may depend on: accents that join, spaces that a first word loses.
OVERLAP = 6
LONGEST_CHARACTER = 4  # bytes of UTF-8, each a token at worst


class TextStream:
    """The text of one answer. `push` returns what is certain to be next; together with what `finish` returns, that is
    the whole text.

    A character of several tokens comes when it is complete, and what may be the beginning of a stop text when it is
    known not to be one. Where a tokenizer takes back what it had made of tokens (bytes that turn out to be no UTF-8),
    what was handed out stays, and the tokens after it are decoded on their own. `stopped` once a stop text is complete,
    of several in one token the one that begins first: it and what follows do not belong to the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.stopped = False
        self.text = ""  # handed out
        self._held = ""  # decoded, kept back
        self._from = 0  # the tokens from here on are decoded again with a new one
        self._known = ""  # their text, up to the tokens of which something was made
        self._said = 0  # number of those tokens

    def push(self, token: int) -> str:
        self.tokens.append(token)
        whole = self._decode(self.tokens[self._from :])
        if whole.endswith("\ufffd"):
            return ""
        return self._add(self._new(whole))

    def _new(self, whole: str) -> str:
        """What is new in the text of the tokens decoded again."""
        if not whole.startswith(self._known):
            self._from, self._known = self._said, ""
            whole = self._decode(self.tokens[self._from :])
        new = whole[len(self._known) :]
        self._known, self._said = whole, len(self.tokens)
        if self._said - self._from > 2 * OVERLAP:
            self._forget(whole)
        return new

    def _forget(self, whole: str) -> None:
        """Decode fewer tokens again, from a place that cuts no character and has a word before what is to come."""
        for begin in range(len(self.tokens) - OVERLAP, len(self.tokens) - OVERLAP - LONGEST_CHARACTER, -1):
            known = self._decode(self.tokens[begin:])
            if whole.endswith(known) and known.strip():
                self._from, self._known = begin, known
                return

    def finish(self) -> str:
        """What was kept back and belongs to the text after all."""
        if self.stopped:
            return ""
        rest = self._add(self._new(self._decode(self.tokens[self._from :])))
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
