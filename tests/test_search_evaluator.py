"""The evaluator against Hugging Face's own model with an edited stack of layers."""

import gc
import random

import pytest
import torch
from characters import Characters
from families import FAMILIES, LAYERS, tiny
from oracles import edited, greedy

from drllm_fast.active import ACTIVE
from drllm_fast.cache import RoutedCache
from drllm_fast.search import PathEvaluator
from drllm_fast.search.path_tree import PathTree, Prefix
from drllm_fast.search.token_trie import TokenTrie
from drllm_fast.search.tree_forward import TreeForward

TOKENIZER = Characters()
STORES = {"on": 1 << 30, "off": 0, "tiny": 3 * 20 * 32 * 4}
CONTEXT, CHOICES = "Which way is up?", [" north", " no", " north by north", " a balloon"]


def some_paths(count, layers=LAYERS, seed=0):
    rng = random.Random(seed)
    paths = [tuple(rng.choice((0, 1, 1, 2)) for _ in range(layers)) for _ in range(count)]
    return [(1,) * layers, *paths, (0,) * layers, (2,) * layers, paths[0]]


@torch.no_grad()
def one_by_one(model, context, choices, paths):
    """[P, C]: each choice and path a forward of its own."""
    rows = []
    for path in paths:
        alone, row = edited(model, path), []
        for choice in choices:
            before, after = TOKENIZER.encode(context), TOKENIZER.encode(choice)
            ids = torch.tensor([before + after])
            logits = alone(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            row.append(sum(float(logits[len(before) - 1 + i, t]) for i, t in enumerate(after)))
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_edited_stacks(family):
    model, paths = tiny(family), some_paths(5)
    expected = one_by_one(model, CONTEXT, CHOICES, paths)
    assert expected.std(0).min() > 0.05  # paths are told apart
    for name, size in STORES.items():
        evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size)
        for _ in range(2):  # the second time from the store
            scores = evaluator.score_choices(CONTEXT, CHOICES, paths)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, expected, atol=5e-4, rtol=0, msg=lambda m, n=name: f"store {n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_those_of_edited_stacks(family):
    model, paths, new = tiny(family), some_paths(4), 9
    requests = [("Which way is up?", paths), ("A", paths[1:4]), ("Half of the moon", paths[:2])]
    expected = [
        [greedy(edited(model, path), torch.tensor(TOKENIZER.encode(prompt)), new)[0].tolist() for path in own]
        for prompt, own in requests
    ]
    for size in STORES.values():
        evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size)
        for _ in range(2):
            assert evaluator.greedy_many(requests, new) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "mixtral"])
def test_forwards_of_one_token(family):
    """Where the stand-in for a mask is as long as the prompt."""
    model, paths = tiny(family), some_paths(5)
    evaluator = PathEvaluator(model, TOKENIZER)
    expected = one_by_one(model, "A", ["b", "c"], paths)
    torch.testing.assert_close(evaluator.score_choices("A", ["b", "c"], paths), expected, atol=5e-4, rtol=0)
    answers = [greedy(edited(model, path), torch.tensor(TOKENIZER.encode("A")), 4)[0].tolist() for path in paths]
    assert evaluator.greedy("A", paths, 4) == answers
    assert evaluator.score_choices("", ["b", "c"], paths).std(0).min() > 0.05


def test_long_prompts_and_answers():
    """A window is passed, and a slot grows, more than once."""
    model, paths, new = tiny("gemma3_text"), some_paths(4), 140
    requests = [("Up or down? " * 9, paths), ("Up?", paths[:1])]
    expected = [
        [greedy(edited(model, path), torch.tensor(TOKENIZER.encode(prompt)), new)[0].tolist() for path in own]
        for prompt, own in requests
    ]
    assert PathEvaluator(model, TOKENIZER).greedy_many(requests, new) == expected


def test_decoding_does_not_write_to_the_store():
    evaluator = PathEvaluator(tiny("llama"), TOKENIZER)
    for _ in range(2):  # the second time from the store
        answer = evaluator.greedy(CONTEXT, [1, 0, 2, 1], 9)
        states = [t for p in evaluator.store._kept.values() for t in (p.hidden, *(t for pair in p.slots for t in pair))]
        before = [t.clone() for t in states]
        assert evaluator.greedy(CONTEXT, [1, 0, 2, 1], 9) == answer
        assert len(states) == 4 + 2 * 4 and all(map(torch.equal, states, before))


def test_a_prompt_asked_twice_is_run_once():
    model, paths = tiny("llama"), some_paths(3)
    evaluator = PathEvaluator(model, TOKENIZER)
    once = evaluator.score_choices(CONTEXT, CHOICES, paths)
    visits = evaluator.stats.visits
    evaluator = PathEvaluator(model, TOKENIZER)
    first, second = evaluator.score_many([(CONTEXT, CHOICES, paths), (CONTEXT, CHOICES, paths[::-1])])
    assert torch.equal(first, once) and torch.equal(second, once.flip(0))
    assert evaluator.stats.visits == visits
    again, _ = evaluator.score_many([(CONTEXT, CHOICES, paths), (CONTEXT, CHOICES, paths[:2])])
    torch.testing.assert_close(again, once)
    assert evaluator.stats.visits == visits  # all of it came from the store


def distinct_visits(paths, known=frozenset()):
    """How many block visits a tree of paths needs beyond those whose result is among the `known` prefixes."""
    passes = set()
    for path in paths:
        for layer, times in enumerate(path):
            if path[: layer + 1] not in known:
                passes |= {(path[:layer], number) for number in range(times)}
    return len(passes)


def test_what_paths_share_is_run_once():
    paths = some_paths(8, seed=3)
    evaluator = PathEvaluator(tiny("llama"), TOKENIZER)
    evaluator.score_choices(CONTEXT, CHOICES, paths)
    assert evaluator.stats.visits == distinct_visits(paths)
    assert evaluator.stats.visits_alone == sum(map(sum, set(paths)))
    known = {path[:depth] for path in paths for depth in range(LAYERS + 1)}
    more = some_paths(8, seed=4)
    evaluator.score_choices(CONTEXT, CHOICES, more)
    assert evaluator.stats.visits == distinct_visits(paths) + distinct_visits(more, known)


def test_small_forwards_give_the_same():
    model, paths = tiny("gemma2"), some_paths(6)
    requests = [(CONTEXT, CHOICES, paths), ("Up?", [" A", " B"], paths[:3]), ("", ["No one knows"], paths[2:])]
    expected = PathEvaluator(model, TOKENIZER).score_many(requests)
    whole, forwards = 0, []
    for limits in ({}, {"max_tokens": 1}, {"max_tokens": 100}, {"max_logits": 1}, {"max_logits": 20_000}):
        for size in STORES.values():
            evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size, **limits)
            for scores, right in zip(evaluator.score_many(requests), expected, strict=True):
                torch.testing.assert_close(scores, right, atol=1e-4, rtol=0)
            whole = whole or evaluator.stats.visits
            forwards.append(evaluator.stats.forwards)
            assert evaluator.stats.visits == whole or "max_tokens" in limits
    tokens = [len(p.trie) for p in evaluator._prompts.values()]
    rows = [len(set(map(tuple, own))) for _, _, own in requests]
    assert forwards[:3] == forwards[9:12] == forwards[12:] == [1] * 3 and forwards[3:6] == [sum(rows)] * 3
    assert forwards[6] >= sum(r * t for r, t in zip(rows, tokens, strict=True)) / 100
    assert len(expected[2][0]) == 1


def test_the_store_keeps_to_its_size_and_drops_descendants_first():
    model = tiny("llama")
    for size in (1, 2_000, 20_000, 60_000):
        evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size)
        for seed in range(6):
            evaluator.greedy_many([("Which way?", some_paths(5, seed=seed)), (f"Or {seed}", some_paths(2))], 2)
            evaluator.score_choices(CONTEXT, CHOICES, some_paths(3, seed=seed))
            store = evaluator.store
            assert store.bytes == sum(prefix.bytes() for prefix in store._kept.values()) <= size
            for (prompt, path), prefix in store._kept.items():
                assert len(path) == 1 or store._kept[prompt, path[:-1]] is prefix.parent
                for tensor in (prefix.hidden, *(t for pair in prefix.slots for t in pair)):
                    assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view of a forward's tensor
    assert len(store)
    for prompt in ("Which way?", *(f"Or {seed}" for seed in range(6))):
        evaluator.forget(prompt)
    evaluator.forget(CONTEXT, CHOICES)
    assert len(store) == store.bytes == 0


def test_prompts_share_a_small_store():
    """None pushes out what another one's states extend, and all have their first blocks kept."""
    model, rng = tiny("llama"), random.Random(0)
    texts = [f"Which way is {word}?" for word in ("up", "down", "left", "back")]
    for size in (4_000, 30_000, 100_000):
        evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size)
        kept = evaluator.store._kept
        for _ in range(30):
            own = rng.sample(texts, 3)
            evaluator.score_many([(text, CHOICES, some_paths(3, seed=rng.randrange(4))) for text in own])
            for (prompt, path), prefix in kept.items():
                assert prefix.parent.path == path[:-1] and (len(path) == 1 or kept[prompt, path[:-1]] is prefix.parent)
    evaluator = PathEvaluator(model, TOKENIZER, store_bytes=STORES["tiny"] * 8)
    evaluator.score_many([(text, CHOICES, some_paths(3)) for text in texts])
    assert len({prompt for prompt, _ in evaluator.store._kept}) == len(texts)


def test_nothing_but_the_store_outlives_a_call():
    """No cycle, no view and no parent keeps a forward's tensors."""
    evaluator = PathEvaluator(tiny("llama"), TOKENIZER, store_bytes=60_000)

    def run(seed):
        evaluator.score_many([(CONTEXT, CHOICES, some_paths(5, seed=seed)), (f"Or {seed}", CHOICES, some_paths(3))])
        evaluator.greedy_many([(CONTEXT, some_paths(5, seed=seed)), ("Or", some_paths(3))], 3)
        evaluator.divergence(CONTEXT, CHOICES, some_paths(2, seed=seed))

    def storages():
        held = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor]
        return {storage.data_ptr(): storage.nbytes() for storage in held}

    run(0)
    evaluator.store.clear()
    gc.collect()
    gc.disable()
    try:
        before = storages()
        for seed in range(1, 5):
            run(seed)
        left = sum(size for place, size in storages().items() if place not in before)
        tries = sum(prompt.trie.keys.nbytes for prompt in evaluator._prompts.values())
        assert 0 < evaluator.store.bytes <= left <= evaluator.store.bytes + tries
        kept = set(map(id, evaluator.store._kept.values()))
        assert all(id(p) in kept for p in gc.get_objects() if type(p) is Prefix and p.path)
    finally:
        gc.enable()


def test_a_call_that_dies_leaves_nothing_behind(monkeypatch):
    model, paths = tiny("llama"), some_paths(5)
    kinds = [type(module) for module in model.modules()]
    expected = PathEvaluator(model, TOKENIZER).score_choices(CONTEXT, CHOICES, paths)
    answers = PathEvaluator(model, TOKENIZER).greedy(CONTEXT, paths, 4)
    evaluator = PathEvaluator(model, TOKENIZER, max_tokens=150)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    places = [(model.model.layers[2].mlp, "forward"), (model.lm_head, "forward"), (torch.Tensor, "index_add_")]
    for target, name in places:
        for call in (
            lambda: evaluator.score_choices(CONTEXT, CHOICES, paths),
            lambda: evaluator.divergence(CONTEXT, CHOICES, paths),
            lambda: evaluator.greedy(CONTEXT, paths, 4),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(target, name, interrupt)
                try:
                    call()
                except KeyboardInterrupt as caught:  # held on to, as a debugger or a notebook does
                    error = caught
            assert error.__traceback__ and not torch.is_inference_mode_enabled() and ACTIVE.get() is None
            assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(evaluator.score_choices(CONTEXT, CHOICES, paths), expected)
    assert evaluator.greedy(CONTEXT, paths, 4) == answers


def test_defaults_of_torch_do_not_matter():
    model, paths = tiny("llama"), some_paths(3)
    requests = [(CONTEXT, paths), ("A", paths)]

    def run():
        evaluator = PathEvaluator(model, TOKENIZER)
        scores = evaluator.score_choices(CONTEXT, CHOICES, paths), evaluator.divergence(CONTEXT, CHOICES, paths)
        return *scores, evaluator.greedy_many(requests, 3)

    expected = run()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        found = run()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found[:2], expected)) and found[2] == expected[2]
    assert {t.dtype for t in found[:2]} == {torch.float32} and not any(t.is_inference() for t in found[:2])


def test_states_of_another_arithmetic_are_not_used():
    model, paths = tiny("llama"), some_paths(3)
    evaluator = PathEvaluator(model, TOKENIZER)

    def same():
        fresh = PathEvaluator(model, TOKENIZER).score_choices(CONTEXT, CHOICES, paths)
        assert torch.equal(evaluator.score_choices(CONTEXT, CHOICES, paths), fresh)
        return fresh

    exact = same()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.allclose(same(), exact, atol=1e-3)
    same()
    model.to(torch.bfloat16)
    assert not torch.allclose(same(), exact, atol=1e-3)


@torch.no_grad()
def test_divergence():
    model, paths = tiny("qwen3"), some_paths(4)
    ids, start = torch.tensor([TOKENIZER.encode(CONTEXT + CHOICES[2])]), len(CONTEXT) - 1
    own = [edited(model, path)(input_ids=ids, use_cache=False).logits[0, start:-1] for path in paths]
    dense = own[0].log_softmax(-1)
    expected = torch.stack([(dense.exp() * (dense - logits.log_softmax(-1))).sum(-1).mean() for logits in own])
    for size in STORES.values():
        evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size)
        found = evaluator.divergence(CONTEXT, CHOICES[2:3], paths)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found[0].abs() < 1e-6 and found[1:].max() > 0.1


@torch.no_grad()
def divergences(model, context, choices, paths):
    """[P], by hand: over all tokens of the choices, those that choices begin with in common once."""
    before, alone, rows = TOKENIZER.encode(context), [edited(model, path) for path in [(1,) * LAYERS, *paths]], []
    seen = set()
    for choice in choices:
        after = TOKENIZER.encode(choice)
        places = [i for i in range(len(after)) if tuple(after[:i]) not in seen]
        seen |= {tuple(after[:i]) for i in places}
        ids = torch.tensor([before + after])
        logp = [m(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1) for m in alone]
        for place in places:
            at = len(before) - 1 + place
            dense = logp[0][at]
            rows.append([float((dense.exp() * (dense - other[at])).sum()) for other in logp[1:]])
    return torch.tensor(rows).mean(0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_measuring_many_is_scoring_and_divergence(family):
    model = tiny(family)
    requests = [
        (CONTEXT, CHOICES, some_paths(4)),
        ("A", ["bcd"], some_paths(2, seed=1)),
        (CONTEXT, CHOICES, [(0, 1, 1, 2)]),  # of a prompt that is there already
        ("Half of the moon", [" is", " was"], (1, 1, 0, 1)),  # one path
    ]
    for size in STORES.values():
        evaluator = PathEvaluator(model, TOKENIZER, store_bytes=size, max_tokens=200)
        for _ in range(2):
            for (context, choices, paths), (scores, kl) in zip(requests, evaluator.measure_many(requests), strict=True):
                paths = [paths] if isinstance(paths[0], int) else paths
                assert scores.dtype == kl.dtype == torch.float32 and kl.shape == (len(paths),)
                expected = one_by_one(model, context, choices, paths)
                torch.testing.assert_close(scores, expected, atol=5e-4, rtol=0)
                torch.testing.assert_close(kl, divergences(model, context, choices, paths), atol=2e-4, rtol=1e-3)


def test_measuring_runs_each_forward_once():
    """Scores and divergences together cost what divergences alone do; the dense reference is not counted."""
    model, paths = tiny("llama"), some_paths(5)
    alone, both = (PathEvaluator(model, TOKENIZER, store_bytes=0) for _ in range(2))
    kl = alone.divergence(CONTEXT, CHOICES, paths)
    ((scores, same),) = both.measure_many([(CONTEXT, CHOICES, paths)])
    assert torch.equal(kl, same) and both.stats == alone.stats and both.stats.paths == len(set(paths))
    assert both.stats.visits == distinct_visits(paths)
    torch.testing.assert_close(scores, alone.score_choices(CONTEXT, CHOICES, paths))
    assert both.measure_many([]) == []
    with pytest.raises(ValueError, match="choices must be a list"):
        both.measure_many([(CONTEXT, " north", paths)])


def test_the_model_is_left_as_it_was():
    model, paths = tiny("llama", attention_dropout=0.5), some_paths(3)
    kinds = [type(module) for module in model.modules()]
    ids = torch.tensor([TOKENIZER.encode(CONTEXT)])
    before = model(input_ids=ids).logits
    expected = PathEvaluator(model, TOKENIZER).score_choices(CONTEXT, CHOICES, paths)
    model.train()
    torch.testing.assert_close(PathEvaluator(model, TOKENIZER).score_choices(CONTEXT, CHOICES, paths), expected)
    assert [type(module) for module in model.modules()] == kinds and model.training
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, before)

    model.enable_dynamic_routing([1, 0, 1, 2])  # which is not what the evaluator asks
    model(input_ids=ids)
    plan = model.routing.plan
    evaluator = PathEvaluator(model, TOKENIZER)
    with model.routing.disabled():
        torch.testing.assert_close(evaluator.score_choices(CONTEXT, CHOICES, paths), expected)
        evaluator.greedy(CONTEXT, paths, 3)
    with model.routing.using([1, 1, 1, 0]):
        torch.testing.assert_close(evaluator.score_choices(CONTEXT, CHOICES, paths), expected)
        evaluator.greedy(CONTEXT, paths, 3)
    assert torch.equal(model.routing.plan, plan)
    with pytest.raises(ValueError, match="entries"):
        evaluator.score_choices(CONTEXT, CHOICES, [[1, 1, 1]])
    model(input_ids=ids)
    assert torch.equal(model.routing.plan, plan)


def test_models_that_cannot_be_searched(monkeypatch):
    model, path = tiny("llama"), [1] * LAYERS
    update = RoutedCache.update
    monkeypatch.setattr(RoutedCache, "update", lambda *args, **kwargs: [t * 1 for t in update(*args, **kwargs)])
    with pytest.raises(NotImplementedError, match="changes keys or values between the cache and the attention"):
        PathEvaluator(model, TOKENIZER).greedy(CONTEXT, path, 1)  # no step of decoding, which would refuse it too
    model.model.layers[2].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(NotImplementedError, match="does not go through transformers' AttentionInterface"):
        PathEvaluator(model, TOKENIZER).score_choices(CONTEXT, CHOICES, path)


def test_arguments_of_a_layer_are_cut_anew():
    """Even where the next layer's lies at the address of the last one's."""
    tries = [TokenTrie([[5, 6]]), TokenTrie([[7]])]
    roots = [Prefix((), None, 0), Prefix((), None, 1)]
    forward = TreeForward(None, tries, PathTree([[(1,)], [(1,)]], [roots[:1], roots[1:]], 1), None, torch.device("cpu"))
    for layer in range(50):
        for prompts, wanted in (((1,), [2]), ((0, 1, 0), [0, 1, 2, 0, 1]), ((1, 0), [2, 0, 1])):
            given = {"a": (torch.arange(3.0)[None] + layer, torch.zeros(3)), "b": [torch.full((1, 3, 2), layer)]}
            got = forward._part(given, prompts)
            assert got["a"][0].tolist() == [[layer + w for w in wanted]] and got["a"][1].shape == (3,)
            assert torch.equal(got["b"][0], torch.full((1, len(wanted), 2), layer))
            assert forward._part(None, prompts) is None and forward._part(given["a"][1], prompts) is given["a"][1]


def test_answers_end_where_they_should():
    model, paths = tiny("llama"), some_paths(3)
    evaluator = PathEvaluator(model, TOKENIZER)
    whole = evaluator.greedy(CONTEXT, paths, 8)
    assert [len(answer) for answer in whole] == [8] * len(paths)
    end = whole[0][3]
    model.generation_config.eos_token_id = [end]
    cut = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert evaluator.greedy(CONTEXT, paths, 8) == cut and len({len(a) for a in cut}) > 1
    model.generation_config.eos_token_id = None
    stop = TOKENIZER.decode(whole[0][2:4])
    ends = [TOKENIZER.decode(answer).find(stop) for answer in whole]
    cut = [answer if at < 0 else answer[: at + len(stop)] for answer, at in zip(whole, ends, strict=True)]
    assert evaluator.greedy(CONTEXT, paths, 8, stop=[stop]) == cut and ends[0] >= 0
    assert evaluator.greedy(CONTEXT, paths, 1) == [answer[:1] for answer in whole]


def test_refusals():
    evaluator = PathEvaluator(tiny("llama"), TOKENIZER)
    path = [1] * LAYERS
    with pytest.raises(ValueError, match="list of one or more texts"):
        evaluator.score_choices(CONTEXT, " north", path)
    with pytest.raises(ValueError, match="list of one or more texts"):
        evaluator.score_choices(CONTEXT, [], path)
    with pytest.raises(ValueError, match="no tokens of its own"):
        evaluator.score_choices(CONTEXT, [" a", ""], path)
    with pytest.raises(ValueError, match="values from 0 to 3"):
        evaluator.score_choices(CONTEXT, CHOICES, [[1, 3, 0, 1]])
    with pytest.raises(ValueError, match="exceeds the model's 256 positions"):
        evaluator.score_choices("x" * 255, [" yes"], path)
    evaluator.score_choices("x" * 254, [" y"], path)
    evaluator.greedy("x" * 250, path, 6)
    with pytest.raises(ValueError, match="250 tokens and 7 of its answer exceeds"):
        evaluator.greedy("x" * 250, path, 7)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"original_max_position_embeddings": 64, "factor": 4.0}
    longer = PathEvaluator(tiny("phi3", rope_parameters=rope, original_max_position_embeddings=64), TOKENIZER)
    longer.score_choices("x" * 63, [" y"], path)
    with pytest.raises(ValueError, match="exceeds the model's 64 positions"):
        longer.score_many([("x", [" y"], path), ("x" * 64, [" y"], path)])
    with pytest.raises(ValueError, match="max_new_tokens"):
        evaluator.greedy("x", path, 0)
    for stop in ("end", ["end", ""]):
        with pytest.raises(ValueError, match="stop must be a list of texts"):
            evaluator.greedy("x", path, 1, stop=stop)
    with pytest.raises(NotImplementedError, match="output_router_logits"):
        PathEvaluator(tiny("mixtral", output_router_logits=True), TOKENIZER)
    with pytest.raises(ValueError, match="store_bytes|max_bytes"):
        PathEvaluator(tiny("llama"), TOKENIZER, store_bytes=-1)
