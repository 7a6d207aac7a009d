"""The engine: many prompts of mixed lengths and paths equal each alone, by Hugging Face's own generate."""

import math
import random

import pytest
import torch
from families import FAMILIES, LAYERS, prompts, tiny
from generation_cases import ROWS, Answers, ByContent, Letters, Watched, finished, routed, routers
from oracles import edited

import drllm_fast
from drllm_fast.generation import Engine, Sampling, generate
from drllm_fast.generation import engine as engine_module

# Tokens of the prompt, path, new tokens. Every kind of path: a block skipped, all repeated, none run, the last alone.
CASES = [
    (1, [0, 1, 1, 1], 12),
    (23, [2, 2, 2, 2], 1),
    (5, [0, 0, 0, 0], 7),
    (40, [0, 0, 0, 1], 9),
    (2, [1, 2, 0, 1], 12),
    (14, [1, 1, 1, 1], 3),
    (9, [2, 0, 2, 0], 10),
    (31, [0, 2, 1, 0], 5),
    (3, [1, 1, 1, 1], 8),
]
TIGHT = {"max_batch": 3, "lookahead": 2, "max_prompt_tokens": 30, "kv_tokens": 400}


@pytest.fixture
def scores(monkeypatch):
    """The scores from which each prompt's tokens were chosen, by the id of its Sampling."""
    seen, own = {}, engine_module.choose_tokens

    def noted(logits, samplings, numbers):
        for row, (sampling, number) in enumerate(zip(samplings, numbers, strict=True)):
            assert number == len(seen.setdefault(id(sampling), []))
            seen[id(sampling)].append(logits[row].float())
        return own(logits, samplings, numbers)

    monkeypatch.setattr(engine_module, "choose_tokens", noted)
    return seen


class Listed:
    """The paths of known prompts, block by block."""

    def __init__(self, paths):
        self.paths = paths

    def route(self, layer, prompts):
        rows = prompts.input_ids.split(prompts.cu_seqlens.diff().tolist())
        return torch.tensor([self.paths[tuple(row.tolist())][layer] for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_rows_equal_each_alone(family, scores):
    """Rows join and leave all the time: they have unlike lengths, paths and ends, and few fit at once. Most get their
    paths from a policy, in forwards of several prompts; two bring their own."""
    model = tiny(family)
    rows = [row.tolist() for row in prompts([length for length, *_ in CASES])]
    answers = Answers(model)
    expected = [answers(row, path, new) for row, (_, path, new) in zip(rows, CASES, strict=True)]
    samplings = [Sampling(max_new_tokens=new) for *_, new in CASES]
    engine = Engine(model, Letters(), **TIGHT)
    engine.pool = Watched(TIGHT["kv_tokens"])
    policy = Listed({tuple(row): path for row, (_, path, _) in zip(rows, CASES, strict=True)})
    with routed(model, policy), engine:
        for number, (row, (_, path, _), sampling) in enumerate(zip(rows, CASES, samplings, strict=True)):
            engine.submit(row, sampling, path=path if number in (3, 6) else None)
        results = finished(engine)
        per_token = engine.pool.bytes_per_token()
    for index, ((tokens, logits), (length, path, new)) in enumerate(zip(expected, CASES, strict=True)):
        result = results[index]
        assert result.tokens == tokens, index
        torch.testing.assert_close(torch.stack(scores[id(samplings[index])]), logits, atol=2e-3, rtol=0)
        assert (result.path, result.visits, result.finish_reason) == (tuple(path), sum(path), "length")
        assert result.prompt_tokens == length and result.text == Letters().decode(tokens, True)
        assert result.kv_bytes == sum(path) * (length + new - 1) * per_token
        assert 0 <= result.waited <= result.first_token <= result.seconds
    stats = engine.stats
    assert stats.prompt_forwards < len(CASES)
    assert stats.peak_kv_bytes == engine.pool.most * per_token > 0 and not engine.pool.live
    assert (stats.prompts, stats.prompt_tokens) == (len(CASES), sum(length for length, *_ in CASES))
    assert stats.tokens == sum(new for *_, new in CASES)
    assert stats.visits == sum((new - 1) * sum(path) for _, path, new in CASES)
    assert stats.peak_rows <= 5 and stats.block_runs <= stats.steps * 2 * LAYERS
    with torch.no_grad():
        kept = model(torch.tensor([[5, 6, 7]])).past_key_values.layers[1]
    assert per_token == sum(t[0, :, :1].numel() * 4 for t in (kept.keys, kept.values))


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def answers(llama):
    return Answers(llama)


def as_run(policy, row):
    """The path that the routed model's own forward takes for one prompt."""
    if isinstance(policy, ByContent):
        return policy.path(row)
    if isinstance(policy, drllm_fast.StaticPolicy):
        return list(policy.path)
    model = tiny("llama")
    with routed(model, policy), torch.no_grad():
        model(torch.tensor([row]))
        return model.routing.plan[0].tolist()


@pytest.mark.parametrize("kind", ["content", "routers", "static", "path", "plan of one"])
def test_policies_choose_each_row_its_path(llama, answers, kind):
    policy = {
        "content": ByContent(),
        "routers": routers(),
        "static": drllm_fast.StaticPolicy([1, 3, 0, 2], num_layers=LAYERS, budget=0.75),
        "path": [1, 0, 2, 1],
        "plan of one": [[0, 2, 1, 1]],
    }[kind]
    paths = {"path": [[1, 0, 2, 1]] * len(ROWS), "plan of one": [[0, 2, 1, 1]] * len(ROWS)}.get(kind)
    paths = paths or [as_run(policy, row) for row in ROWS]
    assert len(set(map(tuple, paths))) >= (3 if kind in ("content", "routers") else 1)
    expected = [answers(row, path, 6)[0] for row, path in zip(ROWS, paths, strict=True)]
    with routed(llama, policy):
        results = generate(llama, Letters(), ROWS, max_new_tokens=6, max_batch=3, lookahead=2, max_prompt_tokens=25)
    assert [list(result.path) for result in results] == paths
    assert [result.tokens for result in results] == expected


def ranked():
    return drllm_fast.StaticPolicy([1, 3, 0], num_layers=LAYERS, budget=1.0)


@pytest.mark.parametrize("make", [routers, lambda: ByContent(1.0), ranked], ids=["routers", "content", "static"])
def test_budgets_of_each_prompt(llama, answers, make):
    budgets = [1.0, 0.3, None, 0.5, 0.3, 1.0, None, 0.5, 0.3, 1.0]
    policy, paths = make(), []
    for row, budget in zip(ROWS, budgets, strict=True):
        own = make()
        if budget is not None:
            own.budget = budget
        paths.append(as_run(own, row))
    before = policy.budget
    expected = [answers(row, path, 5)[0] for row, path in zip(ROWS, paths, strict=True)]
    with routed(llama, policy):
        results = generate(llama, Letters(), ROWS, max_new_tokens=5, budgets=budgets, max_batch=4, lookahead=1)
        assert llama.routing.budget == before  # the policy's own stays
    assert [list(result.path) for result in results] == paths and len(set(map(tuple, paths))) > 1
    assert [result.tokens for result in results] == expected


def test_budgets_follow_a_policy_that_is_replaced(llama, answers):
    """One engine, used twice; budgets are those of the policy of the time."""
    engine = Engine(llama, Letters(), max_batch=2)
    first, second = (drllm_fast.StaticPolicy([a, 3, 0], num_layers=LAYERS, budget=1.0) for a in (1, 2))
    with routed(llama, first):
        with engine:
            engine.submit(ROWS[0], Sampling(3), budget=0.75)
            llama.routing.policy = second
            engine.submit(ROWS[0], Sampling(3), budget=0.75)
            with llama.routing.using([1, 1, 1, 1]), pytest.raises(ValueError, match="keeps no budget"):
                engine.submit(ROWS[0], Sampling(3), budget=0.75)
            results = finished(engine)
        assert [results[i].path for i in (0, 1)] == [(1, 0, 1, 1), (1, 1, 0, 1)]
        llama.routing.policy = [1, 1, 1, 1]
        with engine, pytest.raises(ValueError, match="keeps no budget"):
            engine.submit(ROWS[0], Sampling(3), budget=0.75)


def test_using_disabled_and_given_paths(llama, answers):
    new = Sampling(5)
    with routed(llama, [1, 0, 2, 1]), Engine(llama, Letters(), max_batch=3, lookahead=1) as engine:
        wanted = []
        for row in ROWS[:3]:
            engine.submit(row, new)
            wanted.append((row, [1, 0, 2, 1]))
            with llama.routing.using([0, 2, 0, 1]):
                engine.submit(row, new)
                wanted.append((row, [0, 2, 0, 1]))
                engine.submit(row, new, path=[1, 1, 0, 0])
                wanted.append((row, [1, 1, 0, 0]))
            with llama.routing.disabled():
                engine.submit(row, new)
                wanted.append((row, [1, 1, 1, 1]))
        results = finished(engine)
    for index, (row, path) in enumerate(wanted):
        assert results[index].path == tuple(path) and results[index].tokens == answers(row, path, 5)[0]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bf16_is_as_near_to_fp32_as_the_edited_stack(family, scores):
    """Scores of a token that both say next, since tokens drift apart."""
    model = tiny(family)
    rows, paths = ROWS[:5], [path for _, path, _ in CASES if any(path)][:5]
    exact = [edited(model, path)(torch.tensor([row])).logits[0, -1] for row, path in zip(rows, paths, strict=True)]
    low = tiny(family).to(torch.bfloat16)
    eager = [edited(low, path)(torch.tensor([row])).logits[0, -1] for row, path in zip(rows, paths, strict=True)]
    # One token of the prompt is left to the decode batch: its scores are those after the whole prompt.
    engine = Engine(low, Letters(), max_batch=4, lookahead=1)
    samplings = [Sampling(2) for _ in rows]
    with engine:
        for row, path, sampling in zip(rows, paths, samplings, strict=True):
            engine.submit(row, sampling, path=path)
        finished(engine)
        assert engine.pool.keys.dtype == torch.bfloat16
        heads, dim = engine.pool.keys.shape[0], engine.pool.keys.shape[2]
        assert engine.pool.bytes_per_token() == 2 * heads * dim * 2
    for sampling, true, near, row, path in zip(samplings, exact, eager, rows, paths, strict=True):
        first, second = scores[id(sampling)]
        assert (first - true).abs().max() <= 2 * (near.float() - true).abs().max() + 1e-2
        longer = torch.tensor([[*row, int(first.argmax())]])
        true, near = (edited(m, path)(longer).logits[0, -1].float() for m in (model, low))
        assert (second - true).abs().max() <= 2 * (near - true).abs().max() + 1e-2


def test_an_engine_follows_a_model_that_changes_its_dtype():
    model = tiny("llama")
    engine = Engine(model, Letters(), max_batch=2)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        with engine:
            engine.submit(ROWS[0], Sampling(3), path=[1, 2, 0, 1])
            (result,) = finished(engine).values()
            assert engine.pool.keys.dtype == dtype and len(result.tokens) == 3
        assert engine.pool.keys is None  # nothing is held between


@pytest.fixture(scope="module")
def sampled():
    """Prompts with all kinds of settings, and each one's answer alone."""
    model = tiny("llama")
    kinds = [
        Sampling(7),
        Sampling(9, temperature=1.3, seed=4),
        Sampling(5, temperature=0.8, top_k=9, seed=-3),
        Sampling(8, temperature=2.0, top_p=0.7, seed=2**70),
        Sampling(6, temperature=1.0, top_k=20, top_p=0.9, seed=4),
    ]
    jobs = [(row, kinds[number % len(kinds)]) for number, row in enumerate(ROWS * 2)]
    with routed(model, ByContent()):
        alone = [generate(model, Letters(), [row], sampling=s)[0].tokens for row, s in jobs]
    return model, jobs, alone


@pytest.mark.parametrize("seed", range(6))
def test_answers_do_not_depend_on_company(sampled, seed):
    """Order, batch, lookahead and pool at random; greedy and drawn rows side by side."""
    model, jobs, alone = sampled
    wild = random.Random(seed)
    order = wild.sample(range(len(jobs)), len(jobs))
    options = {
        "max_batch": wild.choice([1, 2, 5, 64]),
        "lookahead": wild.choice([0, 1, 7]),
        "max_prompt_tokens": wild.choice([1, 30, 4096]),
        "kv_tokens": wild.choice([None, 8 * 42]),
    }
    with routed(model, ByContent()):
        mine, each = zip(*(jobs[i] for i in order), strict=True)
        results = generate(model, Letters(), mine, sampling=each, **options)
    assert [result.tokens for result in results] == [alone[i] for i in order]
    assert [result.index for result in results] == list(range(len(jobs)))


def test_seeds_differ_and_a_drawn_answer_is_what_the_scores_say(sampled, scores):
    """Hugging Face's scores of the drawn tokens; the draw itself is tested in test_sampling.py."""
    model, jobs, _ = sampled
    row, path = ROWS[4], [1, 2, 0, 1]
    samplings = [Sampling(6, temperature=1.5, top_k=30, seed=seed) for seed in range(6)]
    with routed(model, path):
        results = generate(model, Letters(), [row] * 6, sampling=samplings, max_batch=4, lookahead=0)
    assert len({tuple(result.tokens) for result in results}) == 6
    stack = edited(model, path)
    for result, sampling in zip(results, samplings, strict=True):
        with torch.no_grad():
            logits = stack(torch.tensor([[*row, *result.tokens[:-1]]])).logits[0, len(row) - 1 :]
        torch.testing.assert_close(torch.stack(scores[id(sampling)]), logits, atol=2e-3, rtol=0)


def test_streams_say_the_same(llama):
    with routed(llama, ByContent()):
        options = {"max_new_tokens": 5, "max_batch": 3, "lookahead": 2}
        whole = generate(llama, Letters(), ROWS, **options)
        for stream in ("ordered", "finished"):
            got = list(generate(llama, Letters(), iter(ROWS), stream=stream, **options))
            assert stream == "finished" or [g.index for g in got] == list(range(len(ROWS)))
            assert sorted((g.index, g.tokens) for g in got) == [(w.index, w.tokens) for w in whole]
        tokens, ends = {}, {}
        for delta in generate(llama, Letters(), ROWS, stream="tokens", **options):
            assert delta.index not in ends
            tokens.setdefault(delta.index, []).extend(delta.tokens)
            if delta.result is not None:
                ends[delta.index] = delta.result.tokens
        assert tokens == ends == {w.index: w.tokens for w in whole}
    assert generate(llama, Letters(), []) == []


def test_texts_chats_and_tensors_are_prompts(llama, answers):
    class Chatty(Letters):
        chat_template = "there is one"

        def apply_chat_template(self, messages, add_generation_prompt, tokenize, return_dict):
            assert add_generation_prompt and tokenize and return_dict
            return {"input_ids": self.encode("".join(f"{m['role']}:{m['content']}\n"[:-1] for m in messages))}

    chat = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yes"}]
    given = [
        "user:hibot:yes",
        chat,
        Letters().encode("user:hibot:yes"),
        torch.tensor(Letters().encode("user:hibot:yes")),
    ]
    results = generate(llama, Chatty(), given, max_new_tokens=4)
    expected = answers(Letters().encode("user:hibot:yes"), [1] * LAYERS, 4)[0]
    assert [result.tokens for result in results] == [expected] * 4
    assert all(math.isfinite(result.seconds) for result in results)


def test_a_model_without_logits_to_keep(answers):
    """It gives the scores of every token of every prompt."""
    model = tiny("llama")
    own = model.forward
    model.forward = lambda **given: own(**{**given, "logits_to_keep": 0})
    results = generate(model, Letters(), ROWS, max_new_tokens=4, paths=[[1, 2, 0, 1]] * len(ROWS))
    assert [result.tokens for result in results] == [answers(row, [1, 2, 0, 1], 4)[0] for row in ROWS]


def test_a_step_keeps_nothing_of_the_step_before(llama):
    """The parts of arguments that layers share would be held for as long as the rows stay."""
    with Engine(llama, Letters(), max_batch=2) as engine:
        for path in ([1, 0, 1, 1], [0, 1, 1, 2]):
            engine.submit(ROWS[0], Sampling(20), path=path)
        held = []
        while engine.busy:
            engine.step()
            held.append(len(engine._batch._parts) if engine._batch else None)
    assert len({n for n in held if n}) == 1 and len([n for n in held if n]) > 15


def test_how_much_is_read_at_once_and_how_many_rows_are_held(llama):
    """Forwards are filled up to max_prompt_tokens, a longer prompt has one of its own; rows up to max_batch + lookahead
    are read ahead, and the next ones when others have left."""
    read = []

    class Notes(ByContent):
        def route(self, layer, prompts):
            if layer == 0:
                read.append(prompts.cu_seqlens.diff().tolist())
            return super().route(layer, prompts)

    lengths = [10, 10, 10, 40, 5, 6, 7, 8]
    options = {"max_batch": 3, "lookahead": 3, "max_prompt_tokens": 30}
    with routed(llama, Notes()), Engine(llama, Letters(), **options) as engine:
        for row in prompts(lengths):
            engine.submit(row.tolist(), Sampling(6))
        results = finished(engine)
    assert read[:3] == [[10, 10, 10], [40], [5, 6]] and sorted(sum(read[3:], [])) == [7, 8]
    assert engine.stats.peak_rows == 6 and len(results) == 8 and engine.stats.prompt_forwards == len(read)
