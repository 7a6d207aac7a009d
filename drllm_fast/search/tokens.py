"""Text to tokens as lm-eval does it, so that scores can be compared with its scores.

A context and its continuation are encoded together and the result is cut at the length of the context's own tokens.
Where a merge crosses the border, the context keeps its own tokens and the continuation takes what follows the cut. The
tokens of a context therefore depend on the context alone, and all choices of a prompt share them; the one exception is
an empty context whose continuation begins with the prefix token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands for an empty context: bos, else eos. ValueError where the tokenizer has neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "the tokenizer has neither a bos nor an eos token, and an empty context needs one; set tokenizer.bos_token"
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a prompt, never none: with the special tokens that the tokenizer adds by itself, unless the text
    begins with the prefix token already (a chat template has written it); the prefix token for an empty text."""
    return _encode(tokenizer, text) or [prefix_token(tokenizer)]


def encode_context(tokenizer: PreTrainedTokenizerBase, text: str, *, choices: bool) -> list[int]:
    """The tokens of a prompt without its answer, just those that `encode_pair` gives the context if there are choices,
    and those of `encode_prompt` if the answer is free."""
    if not choices:
        return encode_prompt(tokenizer, text)
    text = text.rstrip()
    return _encode(tokenizer, text) if text else [prefix_token(tokenizer)]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of a context and of a continuation to score after it, neither of them empty.

    Spaces at the end of the context move to the continuation. A context of nothing, or of spaces, becomes the prefix
    token; if the continuation begins with that token, the context takes it over. ValueError if nothing is left to
    score: the continuation is empty, or its text merges into the context's last token.
    """
    text = context.rstrip()
    continuation = context[len(text) :] + continuation
    before = encode_context(tokenizer, context, choices=True)
    if text:
        after = _encode(tokenizer, text + continuation)[len(before) :]
    else:
        after = tokenizer.encode(continuation, add_special_tokens=False)
        if after[:1] == before:
            after = after[1:]
    if not after:
        raise ValueError(
            f"the continuation {continuation!r:.80} has no tokens of its own after a context that ends in "
            f"{text[-40:]!r}; begin it with a space or a line break"
        )
    return before, after


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    prefix = next((tokenizer.decode([token]) for token in ids if token is not None), None)
    if prefix and text.startswith(prefix):
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(text)
