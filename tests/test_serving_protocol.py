"""What may be asked of the server, without one."""

import json

import pytest

pytest.importorskip("fastapi")

from drllm_fast.serving.errors import BadRequest, UnknownModel
from drllm_fast.serving.protocol import HARMLESS, NEUTRAL, ChatRequest, CompletionRequest, parse
from drllm_fast.serving.settings import ServerSettings

SETTINGS = ServerSettings(model="m", max_tokens=100, default_tokens=20)
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields):
    return parse(ChatRequest, json.dumps({"model": "m", "messages": HELLO, **fields}).encode(), SETTINGS)


def completion(**fields):
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "Hello", **fields}).encode(), SETTINGS)


def refused(function, *words, param=None, **fields):
    with pytest.raises(BadRequest) as caught:
        asked = function(**fields)
        asked.sampling(SETTINGS)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message) < 400
    assert param is None or caught.value.param == param


def test_defaults_are_openais():
    sampling = chat().sampling(SETTINGS)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop) == (1.0, 1.0, 0, ())
    assert sampling.max_new_tokens == 20 and not sampling.ignore_eos
    assert chat().sampling(SETTINGS).seed != sampling.seed  # drawn
    tight = ServerSettings(model="m", max_tokens=8, default_tokens=20)
    assert chat().sampling(tight).max_new_tokens == 8


def test_everything_arrives():
    asked = completion(
        max_tokens=7, temperature=0.5, top_p=0.9, top_k=3, seed=-4, stop=["a", "b"], ignore_eos=True, budget=0.75
    )
    s = asked.sampling(SETTINGS)
    assert (s.max_new_tokens, s.temperature, s.top_p, s.top_k, s.seed) == (7, 0.5, 0.9, 3, -4)
    assert s.stop == ("a", "b") and s.ignore_eos and asked.budget == 0.75
    assert completion(stop="x").sampling(SETTINGS).stop == ("x",)
    assert chat(max_completion_tokens=9).sampling(SETTINGS).max_new_tokens == 9
    assert chat(max_completion_tokens=9, max_tokens=9).sampling(SETTINGS).max_new_tokens == 9
    assert chat(temperature=0).sampling(SETTINGS).temperature == 0


def test_prompts():
    assert completion().for_engine() == "Hello"
    assert completion(prompt=["Hello"]).for_engine() == "Hello"
    assert completion(prompt=[4, 5]).for_engine() == [4, 5]
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": "Be brief.", "name": "x"}, {"role": "user", "content": parts}]
    assert chat(messages=messages).for_engine() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_cannot_be_honoured_is_refused_unless_it_changes_nothing(name):
    for value in NEUTRAL[name]:
        chat(**{name: value}), completion(**{name: value})
    for value in (7, "seven", {"a": 1}, [{"type": "function"}]):
        refused(chat, name, "not supported", **{name: value})
        refused(completion, name, "not supported", **{name: value})


def test_zero_is_not_false_and_true_is_not_one():
    """For logprobs, 0 asks for those of the tokens that were chosen."""
    refused(completion, "logprobs", "not supported", logprobs=0)
    refused(chat, "n", "not supported", n=True)
    chat(presence_penalty=0.0, n=1, logprobs=False)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_says_nothing_about_the_answer_is_passed_over(name):
    assert chat(**{name: "whatever"}).for_engine() == HELLO


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": "0.5"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"seed": 2**64},
        {"seed": 0.5},
        {"stop": 3},
        {"stop": [""]},
        {"stop": ["a"] * 17},
        {"max_tokens": 0},
        {"max_tokens": 101},
        {"max_tokens": "5"},
        {"max_completion_tokens": -3},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"ignore_eos": 1},
        {"budget": 0},
        {"budget": -0.5},
        {"budget": "0.5"},
        {"budget": 3},
        {"budget": True},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"includes": True}},
        {"max_new_tokens": 4},
        {"model": 3},
    ],
    ids=str,
)
def test_wrong_values(fields):
    name = next(reversed(fields))
    for function in (chat, completion):
        refused(function, name, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": 3},
        {"prompt": None},
        {"prompt": []},
        {"prompt": [1, "a"]},
        {"prompt": [1.5]},
        {"prompt": ["a", "b"]},
        {"prompt": [[1], [2]]},
        {"messages": HELLO},
    ],
    ids=str,
)
def test_wrong_prompts(fields):
    refused(completion, next(iter(fields)), **fields)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "Hello",
        [{"role": "user"}],
        [{"content": "Hello"}],
        [{"role": "tool", "content": "Hello"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "Hello", "tool_calls": []}],
    ],
    ids=str,
)
def test_wrong_messages(messages):
    refused(chat, "messages", param="messages", messages=messages)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\x00\xff\xfe",
        b'{"model": "m", "prompt": "\xff"}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "m", "prompt": "a", "temperature": NaN}',
        b'{"model": "m", "prompt": "a", "temperature": 1e999}',
        b'{"model": "m", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 50_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_rubbish(body):
    with pytest.raises(BadRequest) as caught:
        parse(CompletionRequest, body, SETTINGS)
    assert 0 < len(str(caught.value)) < 400


def test_another_model():
    with pytest.raises(UnknownModel, match="'gpt'.*'m'") as caught:
        chat(model="gpt")
    assert caught.value.status == 404 and caught.value.body()["error"]["code"] == "model_not_found"


def test_settings():
    with pytest.raises(ValueError, match="timeout must be above 0, got 0"):
        ServerSettings(model="m", timeout=0)
    with pytest.raises(ValueError, match="empty"):
        ServerSettings(model="m", api_key=" ")
    assert ServerSettings(model="m", api_key=" key\n").api_key == "key"  # as a file may have it
