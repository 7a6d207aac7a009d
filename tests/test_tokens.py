"""Prompts and continuations become the tokens that lm-eval would score."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from drllm_fast.search.tokens import encode_pair, encode_prompt, prefix_token
from drllm_fast.smollm2 import converted

CONTEXTS = [
    "Question: What is ice made of?\nAnswer:",
    "Question: What is ice made of?\nAnswer: ",
    "two spaces  ",
    "a line break\n",
    "\ttabs and\u00a0wide\u3000spaces \t",
    "unfinished wor",
    "12 + 3",
    "déjà v",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "",
]
CONTINUATIONS = [
    " water",
    "water",
    "d",
    "4",
    "\nnext",
    " a b c",
    "u, encore",
    "<|im_start|>x",
    "<|im_end|>",
    " 漢字 🙂",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(converted(progress=False), local_files_only=True)


def with_bos(tokenizer, single: str) -> PreTrainedTokenizerFast:
    """A copy that adds special tokens by itself, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    copy.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<|im_start|>", copy.bos_token_id)]
    )
    return copy


def without_bos(tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize("kind", ["plain", "adds bos", "no bos"])
def test_the_tokens_are_those_of_lm_eval(tokenizer, kind):
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    if kind == "adds bos":
        tokenizer = with_bos(tokenizer, "<|im_start|> $A")
        assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
    elif kind == "no bos":
        tokenizer = without_bos(tokenizer)
        assert tokenizer.bos_token_id is None
    harness = HFLM.__new__(HFLM)  # its methods without its model
    harness.tokenizer, harness.add_bos_token, harness.custom_prefix_token_id = tokenizer, None, None
    harness.backend, harness.enable_thinking = "causal", None
    seen = []
    harness._loglikelihood_tokens = lambda requests, **_: seen.extend(requests)
    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    harness.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    assert len(seen) == len(pairs)
    swallowed = 0
    for pair, context, continuation in seen:
        if continuation:
            assert encode_pair(tokenizer, *pair) == (context, continuation), pair
        else:  # lm-eval stops at these later, by an assertion
            swallowed += 1
            with pytest.raises(ValueError, match="no tokens of its own"):
                encode_pair(tokenizer, *pair)
    assert swallowed < 5
    for text in CONTEXTS[:-1]:
        assert encode_prompt(tokenizer, text) == harness.tok_encode(text)


def test_a_merge_over_the_border_leaves_the_context_its_tokens(tokenizer):
    whole = tokenizer.encode("unfinished words follow")
    context, continuation = encode_pair(tokenizer, "unfinished wor", "ds follow")
    assert context == tokenizer.encode("unfinished wor")
    assert whole[: len(context)] != context and continuation == whole[len(context) :]


def test_an_empty_context_is_the_prefix_token(tokenizer):
    bos = tokenizer.bos_token_id
    assert prefix_token(tokenizer) == bos
    assert encode_prompt(tokenizer, "") == [bos]
    sentence = tokenizer.encode(" A sentence.", add_special_tokens=False)
    assert encode_pair(tokenizer, "", " A sentence.") == ([bos], sentence)
    assert encode_pair(tokenizer, " ", "A sentence.") == ([bos], sentence)
    assert encode_pair(tokenizer, "", "<|im_start|> A sentence.") == ([bos], sentence)
    assert prefix_token(without_bos(tokenizer)) == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_what_cannot_be_scored_is_refused(tokenizer):
    for context, continuation in [("a context", ""), ("", ""), ("", "<|im_start|>"), ("Question: wor", "d")]:
        with pytest.raises(ValueError, match="no tokens of its own"):
            encode_pair(tokenizer, context, continuation)
    nothing = SimpleNamespace(bos_token_id=None, eos_token_id=None, encode=lambda text, **_: [])
    for call in (lambda: encode_pair(nothing, "", "x"), lambda: encode_prompt(nothing, "")):
        with pytest.raises(ValueError, match=r"neither a bos nor an eos token.*set tokenizer\.bos_token"):
            call()
