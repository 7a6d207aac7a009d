"""How rows of the engine end: at an end token, a stop text, the last position; cancelled, or with what broke."""

import random

import pytest
from families import LAYERS, prompts, tiny
from generation_cases import ROWS, Answers, Breaks, ByContent, Letters, Taken, Watched, check, finished, routed

from drllm_fast.generation import Engine, Sampling, generate


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def answers(llama):
    return Answers(llama)


def test_end_of_sequence(llama, answers):
    """The end token is none of the answer's; with ignore_eos it is a token like others."""
    path, new = [1, 2, 0, 1], 8
    whole = [answers(row, path, new)[0] for row in ROWS]
    eos = whole[0][3]
    with Engine(llama, Letters(eos), max_batch=3, lookahead=2) as engine:
        for number, row in enumerate(ROWS * 2):
            engine.submit(row, Sampling(new, ignore_eos=number >= len(ROWS)), path=path)
        results = finished(engine)
        per_token = engine.pool.bytes_per_token()
    early = 0
    for number, tokens in enumerate(whole):
        ends = tokens.index(eos) if eos in tokens else None
        assert results[number].tokens == tokens[:ends] and results[len(ROWS) + number].tokens == tokens
        assert results[number].finish_reason == ("length" if ends is None else "stop")
        assert results[len(ROWS) + number].finish_reason == "length"
        # What was read: the prompt, and every token but the last that was chosen, be it the end or not.
        read = len(ROWS[number]) + (new if ends is None else ends + 1) - 1
        assert results[number].kv_bytes == sum(path) * read * per_token
        early += ends is not None
    assert early


def test_the_end_of_sequence_may_be_the_first_token_and_several(llama, answers):
    first = {row_number: answers(ROWS[row_number], [1] * LAYERS, 1)[0][0] for row_number in range(3)}
    own = llama.generation_config.eos_token_id
    llama.generation_config.eos_token_id = [first[0], first[1]]
    try:
        with Engine(llama, Letters(first[2]), max_batch=2, lookahead=2) as engine:
            engine.pool = Watched(engine.pool.size)
            for row in ROWS[:3]:
                engine.submit(row, Sampling(5))
            results = finished(engine)
            assert engine.stats.tokens == 3 and engine.stats.steps == 0 and engine.stats.peak_rows == 3
            assert engine.stats.peak_kv_bytes == engine.pool.most * engine.pool.bytes_per_token()
            for number, result in results.items():
                assert (result.tokens, result.text, result.finish_reason) == ([], "", "stop")
                assert result.kv_bytes == LAYERS * len(ROWS[number]) * engine.pool.bytes_per_token()
    finally:
        llama.generation_config.eos_token_id = own


def test_stop_texts(llama, answers):
    new, path, letters = 10, [1, 1, 2, 1], Letters()
    whole = [answers(row, path, new)[0] for row in ROWS]
    texts = [letters.decode(tokens, True) for tokens in whole]
    samplings = [Sampling(new, stop=("never", text[4:7])) for text in texts]
    samplings[1] = Sampling(new, stop=(texts[1][-2:],))  # with the last token
    samplings[2] = Sampling(new, stop=(texts[2][-1] + "x", texts[2][:2]))  # at once
    samplings[3] = Sampling(new, stop=(texts[3][-1] + "x",))  # begun, not ended
    results = generate(llama, letters, ROWS, sampling=samplings, paths=[path] * len(ROWS), max_batch=4)
    for result, sampling, tokens in zip(results, samplings, whole, strict=True):
        text, taken, reason = letters.decode(tokens, True), new, "length"
        for count in range(1, new + 1):
            said = letters.decode(tokens[:count], True)
            if found := [said.index(stop) for stop in sampling.stop if stop in said]:
                text, taken, reason = said[: min(found)], count, "stop"
                break
        assert (result.text, result.tokens, result.finish_reason) == (text, tokens[:taken], reason)
    assert results[1].finish_reason == "stop" and results[3].text == texts[3]


def test_no_answer_leaves_the_positions():
    """Up to the last position, and not one token further."""
    model = tiny("llama", max_position_embeddings=24)
    rows = [row.tolist() for row in prompts([23, 20, 5, 1])]
    expected = [Answers(model)(row, [1, 2, 1, 0], 24 - len(row))[0] for row in rows]
    results = generate(model, Letters(), rows, max_new_tokens=100, paths=[[1, 2, 1, 0]] * 4, max_batch=2)
    assert [result.tokens for result in results] == expected
    assert all(result.finish_reason == "length" for result in results)
    with pytest.raises(ValueError, match="24 positions"):
        generate(model, Letters(), [[5] * 24])


def test_cancel_in_every_state(llama, answers):
    """The others' answers are as without it, and every place is given back."""
    path = [1, 0, 2, 1]
    expected = [answers(row, path, 8)[0] for row in ROWS]
    for state_name in ("waiting", "ready", "running", "at the end"):
        with Engine(llama, Letters(), max_batch=3, lookahead=2, max_prompt_tokens=20) as engine:
            requests = [engine.submit(row, Sampling(8), path=path) for row in ROWS]
            results, cancelled = {}, []
            while engine.busy:
                queue = getattr(engine.schedule, state_name, None)
                if queue and len(cancelled) < 3 and engine.stats.steps >= 2 * len(cancelled):
                    request = queue[len(queue) // 2]
                    engine.cancel(request)
                    engine.cancel(request)  # nothing more happens
                    cancelled.append(request.index)
                    check(engine)
                for delta in engine.step():
                    if delta.result is not None:
                        results[delta.index] = delta.result
            assert engine.pool.used == 0
            for request in requests:
                engine.cancel(request)  # they have ended
                assert request.finish_reason == ("cancelled" if request.index in cancelled else "length")
        assert len(cancelled) == (0 if state_name == "at the end" else 3)
        assert results.keys() == set(range(len(ROWS))) - set(cancelled)
        assert all(result.tokens == expected[index] for index, result in results.items())


@pytest.mark.parametrize("forward, layer", [(0, 0), (0, 3), (1, 1), (2, 2)])
def test_a_policy_that_breaks_ends_the_rows_of_its_forward(llama, answers, forward, layer):
    with routed(llama, Breaks(forward, layer)):
        with Engine(llama, Letters(), max_batch=2, lookahead=2, max_prompt_tokens=25) as engine:
            requests = [engine.submit(row, Sampling(5)) for row in ROWS]
            results, errors = {}, 0
            while engine.busy:
                try:
                    deltas = engine.step()
                except RuntimeError as error:
                    assert str(error) == "the policy broke"
                    errors += 1
                    deltas = []
                check(engine)
                results |= {delta.index: delta.result for delta in deltas if delta.result is not None}
            assert errors == 1 and engine.pool.used == 0
    broken = [request.index for request in requests if request.finish_reason == "error"]
    assert broken and broken == list(range(broken[0], broken[-1] + 1)) and len(broken) < 5
    assert results.keys() | set(broken) == set(range(len(ROWS)))
    for index, result in results.items():
        assert result.tokens == answers(ROWS[index], ByContent().path(ROWS[index]), 5)[0]


@pytest.mark.parametrize("when", ["prompt", "decode"])
@pytest.mark.parametrize("what", ["tokenizer", "model"])
def test_what_else_breaks_ends_the_rows_and_leaks_nothing(llama, answers, what, when):
    """A tokenizer fails at the second row of a step; a block fails in the middle of a forward."""
    calls = {"n": 0, "armed": False}

    class Fragile(Letters):
        def decode(self, tokens, **options):
            calls["n"] += 1
            if calls["armed"] and what == "tokenizer" and calls["n"] == 2:
                raise RuntimeError("broken")
            return super().decode(tokens, **options)

    def hook(module, args):
        if calls["armed"] and what == "model":
            raise RuntimeError("broken")

    handle = llama.model.layers[2].register_forward_pre_hook(hook)
    try:
        with Engine(llama, Fragile(), max_batch=4, lookahead=0) as engine:
            news = [1 if when == "prompt" else 4, 4, 4, 4]  # the first has ended before the second breaks
            first = [engine.submit(row, Sampling(new)) for row, new in zip(ROWS, news, strict=False)]
            if when == "decode":
                engine.step()
            calls |= {"n": 0, "armed": True}
            with pytest.raises(RuntimeError, match="broken"):
                engine.step()
            calls["armed"] = False
            assert not engine.busy and engine.pool.used == 0 and engine.pool.largest == engine.pool.size
            assert [request.finish_reason for request in first] == ["error"] * 4
            for row in ROWS[:4]:
                engine.submit(row, Sampling(4))
            results = finished(engine)
    finally:
        handle.remove()
    assert [results[4 + n].tokens for n in range(4)] == [answers(row, [1] * LAYERS, 4)[0] for row in ROWS[:4]]


def test_memory_stays_within_the_pool_over_hundreds_of_prompts(llama):
    """A pool for about three rows, prompts out of an iterator of which no more is read than is worked on."""
    wild = random.Random(0)
    read = 0

    def many():
        nonlocal read
        for _ in range(400):
            read += 1
            yield [wild.randrange(2, 97) for _ in range(wild.randrange(1, 12))]

    def samplings():
        while True:
            yield Sampling(wild.randrange(1, 5))

    with routed(llama, ByContent()):
        engine_options = {"max_batch": 4, "lookahead": 3, "kv_tokens": 8 * 15 * 3}
        done = 0
        for result in generate(llama, Letters(), many(), sampling=samplings(), stream="finished", **engine_options):
            done += 1
            assert read - done <= 3 * 7 + 7
            assert 1 <= len(result.tokens) <= 4
    assert done == read == 400


@pytest.mark.parametrize("seed", range(8))
def test_random_submit_cancel_and_step(llama, answers, seed):
    """A user who does anything in any order."""
    wild = random.Random(seed)
    options = {"max_batch": wild.randrange(1, 5), "lookahead": wild.randrange(4)}
    options["max_prompt_tokens"] = wild.choice([1, 20, 999])
    kv_tokens = wild.choice([8 * 44, 8 * 44 * 3])
    requests, taken, wanted = [], Taken(), {}
    with routed(llama, ByContent()), Engine(llama, Letters(), kv_tokens=kv_tokens, **options) as engine:
        engine.pool = Watched(kv_tokens)
        for action in wild.choices("sssssccgggggggggg", k=120):
            if action == "s":
                row, new = wild.choice(ROWS), wild.choice([1, 2, 5, 10])
                path = wild.choice([None, None, [0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 1]])
                requests.append(engine.submit(row, Sampling(new), path=path))
                wanted[requests[-1].index] = row, ByContent().path(row) if path is None else path, new
            elif action == "c" and requests:
                engine.cancel(wild.choice(requests[-8:]))
            else:
                taken.take(engine.step())
            check(engine)
        results = finished(engine, taken)
        assert engine.pool.live == set() and engine.stats.peak_kv_bytes == engine.pool.most * 128
    cancelled = {request.index for request in requests if request.finish_reason == "cancelled"}
    assert results.keys() | cancelled == wanted.keys() and not results.keys() & cancelled and len(results) > 5
    for index, result in results.items():
        row, path, new = wanted[index]
        assert (result.path, result.tokens) == (tuple(path), answers(row, path, new)[0])
