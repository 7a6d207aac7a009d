"""Tokens into text as they come: the joined pieces are the whole decoding, cut at the first stop text."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from drllm_fast.generation.text_stream import TextStream

CORPUS = [
    "the cat sat on the mat, and the other cat did not; stop here. Stop there!",
    "naïve café résumé über straße 東京 日本語 漢字かな交じり文 한국어 🙂🙂 👩‍👩‍👧 e\u0301 o\u0308",
    "    indented\n\n\tcode = 'x'  # comment   \n",
]
TEXTS = [
    *CORPUS,
    "🙂👩‍👩‍👧🇯🇵 e\u0301e\u0301\u0302 日本 語 한",
    "  two spaces  and trailing ",
    "\n",
    "€" * 9 + "x",
    "🦊" * 12 + " end",
]


@cache
def byte_level():
    """Few merges, so that emoji and most of CJK are split over several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>", "<pad>"]
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@cache
def sentencepiece_like():
    """As Llama 2's: words begin with ▁, whose first one is no space, and unknown characters are single bytes."""
    pieces = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdefghijklmnopqrstuvwxyz.,!?éü日", "▁t", "▁th", "▁the", "st", "op", "▁st", "▁stop", "▁▁"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("s", "t"), ("o", "p"), ("▁", "st"), ("▁st", "op"), ("▁", "▁")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZERS = {"bytes": byte_level, "sentencepiece": sentencepiece_like}


def decoded(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def naive(tokenizer, tokens, stop):
    """(the text, after how many tokens a stop text is complete or None). Decodes all of it again for each token; what
    ends in half a character says nothing yet, and where it turns what came before into question marks, it is decoded on
    its own."""
    settled = 0
    for count in range(1, len(tokens) + 1):
        text = decoded(tokenizer, tokens[:count])
        if text.endswith("\ufffd") and count < len(tokens):
            continue
        if ends := [text.index(s) for s in stop if s in text]:
            return text[: min(ends)], count
        settled = count if not text.endswith("\ufffd") else settled
    text, before = decoded(tokenizer, tokens), decoded(tokenizer, tokens[:settled])
    return text if text.startswith(before) else before + decoded(tokenizer, tokens[settled:]), None


def streamed(tokenizer, tokens, stop=()):
    """(the pieces, the tokens that were pushed, the stream): as the engine does."""
    stream, pieces = TextStream(tokenizer, stop), []
    for token in tokens:
        pieces.append(stream.push(token))
        assert "".join(pieces) == stream.text
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return pieces, len(stream.tokens), stream


def check(tokenizer, tokens, stop=()):
    pieces, count, stream = streamed(tokenizer, tokens, stop)
    text, complete = naive(tokenizer, tokens, stop)
    assert "".join(pieces) == text
    assert stream.stopped == (complete is not None) and count == (complete or len(tokens))
    # What was said is never taken back, and no half of a character is among it.
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in decoded(tokenizer, tokens)
    return pieces


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_pieces_are_the_text(kind, text):
    tokenizer = TOKENIZERS[kind]()
    tokens = tokenizer(text)["input_ids"]
    for first in range(min(5, len(tokens))):  # an answer may begin inside a word or a character
        check(tokenizer, tokens[first:])
    assert decoded(tokenizer, tokens) == text or kind == "sentencepiece"
    for last in range(1, len(tokens), 3):
        check(tokenizer, tokens[:last])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_come_with_their_tokens(kind):
    """Nothing is held back but halves of characters and beginnings of stop texts."""
    tokenizer = TOKENIZERS[kind]()
    tokens = tokenizer("the cat sat on the mat, and the other cat did not " * 4)["input_ids"]
    pieces, _, _ = streamed(tokenizer, tokens, ["mat;"])
    late = 0
    for count in range(1, len(tokens) + 1):
        text = decoded(tokenizer, tokens[:count])
        given = "".join(pieces[:count])
        held = text[len(given) :]
        assert text.startswith(given) and held in ("", "m", "ma", "mat")
        late += bool(held)
    assert 0 < late < len(tokens) / 4


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_that_go_on_and_on_leave_spaces_as_they_are(kind):
    tokenizer = TOKENIZERS[kind]()
    word = tokenizer("a the stop")["input_ids"]
    check(tokenizer, [*word, *[tokenizer.eos_token_id] * 20, *word, *word, tokenizer.eos_token_id, *word * 5])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_characters_of_many_bytes_one_after_the_other(kind):
    """However the window of decoded tokens lies, it does not cut a character in two."""
    tokenizer = TOKENIZERS[kind]()
    emoji, euro = (tokenizer(text)["input_ids"] for text in ("🦊" * 20, "€" * 20))
    for lead in range(8):
        for body in (emoji, euro):
            check(tokenizer, [*tokenizer("abcdefgh"[:lead])["input_ids"], *body, *tokenizer(" the end")["input_ids"]])


@pytest.mark.parametrize("text", ["the cat sat on the mat, " * 30, "🦊" * 60], ids=["words", "emoji"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_few_tokens_are_decoded_again(kind, text):
    """However long the answer: twice the overlap, and a character."""
    most = []

    class Counts:
        def decode(self, tokens, **options):
            most.append(len(tokens))
            return TOKENIZERS[kind]().decode(tokens, **options)

    tokens = TOKENIZERS[kind]()(text)["input_ids"]
    assert "".join(streamed(Counts(), tokens)[0]) == text
    assert len(tokens) > 100 and max(most) <= 2 * 6 + 4


STOPS = {
    "over the border of tokens": ("the cat sat on the mat", ["sat on th"], "the cat "),
    "inside one token": ("and the other", ["he o"], "and t"),
    "at the very end": ("the cat", ["cat"], "the "),
    "at the very beginning": ("the cat", ["the"], ""),
    "a prefix of another": ("x stop there", ["stop there", "stop"], "x "),
    "one inside another": ("a the mat b", ["e m", "the mat"], None),
    "what only begins like it": ("the the thex", ["thez", "exy", "x!"], "the the thex"),
    "two in one token": ("cat", ["t", "ca"], None),
    "its beginning twice": ("aab aaab", ["aaab"], "aab "),
    "a space": ("the cat", [" "], "the"),
    "whole characters of many bytes": ("日本 🙂 end", ["🙂"], "日本 "),
    "an accent that joins": ("cafe\u0301 no", ["\u0301"], "cafe"),
}


@pytest.mark.parametrize("case", STOPS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_stop_texts(kind, case):
    text, stop, expected = STOPS[case]
    tokenizer = TOKENIZERS[kind]()
    pieces = check(tokenizer, tokenizer(text)["input_ids"], stop)
    if expected is not None:
        assert "".join(pieces) == expected


class Listed:
    """A token is a text."""

    def __init__(self, *texts):
        self.texts = texts

    def decode(self, tokens, **options):
        return "".join(self.texts[token] for token in tokens)


@pytest.mark.parametrize(
    "texts, stop, expected, pushed",
    [
        (["one tw", "o three"], ["three", "two"], "one ", 2),  # of several in one token, the one that begins first
        (["abcd", "x"], ["bc", "abc"], "", 1),
        (["ab", "cd"], ["b", "abc"], "a", 1),  # complete first, though another begins before it
        (["a", "b", "a", "b", "c"], ["abc"], "ab", 5),
        (["a", "a", "a"], ["aaaa"], "aaa", 3),
        (["end", "."], ["."], "end", 2),
        (["", "", "stop"], ["stop"], "", 3),
    ],
)
def test_which_stop_text_counts(texts, stop, expected, pushed):
    pieces, count, stream = streamed(Listed(*texts), range(len(texts)), stop)
    assert ("".join(pieces), count) == (expected, pushed)
    assert stream.stopped == (expected != "".join(texts))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_half_a_character_at_the_end_is_not_lost(kind):
    tokenizer = TOKENIZERS[kind]()
    tokens = tokenizer("the ☂")["input_ids"]
    whole = len(tokenizer("the ")["input_ids"])
    assert len(tokens) - whole == 3
    for cut in range(1, len(tokens) - whole):
        pieces, _, _ = streamed(tokenizer, tokens[:-cut])
        assert "".join(pieces) == decoded(tokenizer, tokens[:-cut])
        assert "".join(pieces[:-1]) in ("the", "the ")  # it comes at the end alone, with what shares its token
        # A stop text that is complete only with what was held back.
        assert "".join(streamed(tokenizer, tokens[:-cut], ["\ufffd"])[0]).strip() == "the"


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_random_tokens_and_stop_texts(kind, data):
    """Random bytes too: they are no UTF-8 at all."""
    tokenizer = TOKENIZERS[kind]()
    some = [tokenizer(text)["input_ids"] for text in TEXTS]
    piece = st.one_of(
        st.sampled_from(some).flatmap(lambda t: st.slices(len(t)).map(lambda s: t[s][:12])),
        st.lists(st.integers(0, len(tokenizer) - 1), max_size=4),
    )
    tokens = [token for part in data.draw(st.lists(piece, min_size=1, max_size=6)) for token in part]
    if not tokens:
        return
    text = decoded(tokenizer, tokens)
    if not settled(tokenizer, tokens):  # nothing to be equal to; what follows comes all the same
        pieces, _, _ = streamed(tokenizer, [*tokens, *tokenizer("the end")["input_ids"] * 3])
        assert "".join(pieces).endswith("the end" if kind == "bytes" else " the end")
        return
    ends = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 9)).map(lambda s: text[s[0] : s[0] + s[1]])
    stop = data.draw(st.lists(st.one_of(ends, st.text("the stop.", min_size=1, max_size=4)), max_size=3))
    check(tokenizer, tokens, [s for s in stop if s and "\ufffd" not in s])


def settled(tokenizer, tokens):
    """Whether no text is taken back by a later token: one stray byte turns all bytes before it into question marks
    where a tokenizer decodes runs of them together."""
    texts = [decoded(tokenizer, tokens[:count]) for count in range(1, len(tokens) + 1)]
    return all(texts[-1].startswith(text) or text.endswith("\ufffd") for text in texts)
