"""Rows of unlabelled text: a context and how the text goes on.

    text       context and continuation of one paragraph, cut between words: 8 to 96 words, and the 32 that follow
    sentences  whole sentences of at most 24 words, without a context

A file is cut into documents: at WikiText's headings of articles (` = Title = `) where it has them, else at empty lines.
WikiText's spaces around marks (`6 @.@ 5 kg , and "`) are taken out again, as lm-eval does: models have read other text.
"""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drllm_fast.search.rows import Row, check_row

KINDS = ("text", "sentences")
SUFFIXES = (".txt", ".txt.gz")
CONTEXT, CONTINUATION = (8, 96), 32  # words
SENTENCE = (4, 24)
ARTICLE = re.compile(r"^ = [^=].* = \n", re.MULTILINE)
END = re.compile(r"(?<=[.!?]) +(?=[A-Z\"'])")


def text_rows(spec: str, *, seed: int = 0) -> list[Row]:
    """The rows of `text:FILE` or `sentences:FILE`, each with one choice, the continuation, and the "document" it is of.

    The same arguments give the same rows. OSError for a file that is not there or damaged, ValueError for a spec that
    is none and a file without enough text.
    """
    kind, _, name = spec.partition(":")
    if kind not in KINDS or not name.endswith(SUFFIXES):
        raise ValueError(
            f"{spec!r} is not text:FILE or sentences:FILE with a file that ends in {' or '.join(SUFFIXES)}"
        )
    path = Path(name).expanduser()
    if not path.is_file():
        raise OSError(f"there is no file {path}")
    rows = []
    for number, document in enumerate(_documents(path)):
        rng = random.Random(f"{seed}/{kind}/{number}")
        for place, (context, continuation) in enumerate(_cut(kind, document, rng)):
            row: dict[str, Any] = {"id": f"{number}/{place}", "task": kind, "form": "verbatim", "question": context}
            row = check_row({**row, "answer": continuation}, str(path))
            rows.append(row | {"choices": [continuation], "answer": 0, "document": str(number)})
    if not rows:
        raise ValueError(f"{path} has no {kind} to take: no paragraph is long enough, or no line ends a sentence")
    return rows


def _documents(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            text = file.read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise OSError(f"{path} is damaged: {error}; make or fetch it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); convert the file to UTF-8") from error
    if ARTICLE.search(text):
        parts = [_joined(part) for part in ARTICLE.split(text)]
    else:
        parts = re.split(r"\n\s*\n", text)
    return [part for part in parts if part.strip()]


def _joined(text: str) -> str:
    """WikiText as it was written, as far as that can be told."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)\]%]|'(?:s|t|re|ve|ll|d|m)\b|n't\b)", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    return re.sub(r'" ([^"\n]*?) "', r'"\1"', text)


def _cut(kind: str, document: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    for paragraph in document.splitlines():
        if kind == "sentences":
            for sentence in END.split(paragraph.strip()):
                whole = sentence[-1:] in (".", "!", "?") and "<unk>" not in sentence
                if whole and SENTENCE[0] <= len(sentence.split()) <= SENTENCE[1]:
                    yield "", sentence
            continue
        words = paragraph.split()
        while len(words) >= CONTEXT[0] + CONTINUATION:
            length = rng.randint(CONTEXT[0], min(CONTEXT[1], len(words) - CONTINUATION))
            yield " ".join(words[:length]), " ".join(words[length : length + CONTINUATION])
            words = words[length + CONTINUATION :]
