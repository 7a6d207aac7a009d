"""The class for lm-eval: the dense model scores as lm-eval's own class, routed ones as edited stacks of layers."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from cli_cases import TEMPLATE, tiny_folder
from families import LAYERS, tiny
from oracles import edited
from transformers import AutoTokenizer

from drllm_fast import LayerRouters, StaticPolicy

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from drllm_fast.evaluation.lm import RoutedLM, run_lm_eval  # noqa: E402

POSITIONS = 48
LONG = "".join(chr(97 + i * i % 26) for i in range(70))  # more than the model can read
PAIRS = [
    ("Two and two", " are four"), ("Two and two", " are"), ("Two and two", " are five"), ("Two and two", "!"),
    ("", "no context"), ("a b ", "c"), ("A much longer context, with more words", " in it"), (LONG, " and more"),
    (LONG, "?"), ("Two and two", " are four"), ("?", LONG[:POSITIONS]), ("", "?"), (LONG[:POSITIONS], "xy"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_folder(tmp_path_factory.mktemp("tiny"), template=TEMPLATE))


def small(tokenizer):
    """A model that writes printable characters: others do not survive the way to text and back."""
    model = tiny("llama", vocab_size=258, max_position_embeddings=POSITIONS)
    with torch.no_grad():
        for token in range(258):
            if not " " <= tokenizer.decode([token]) <= "~":
                model.lm_head.weight[token] = 0
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    return small(tokenizer)


@pytest.fixture(scope="module")
def upstream(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")


@pytest.fixture(scope="module")
def routers(model):
    made = LayerRouters.for_model(model, router_size=8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        made.w2.mul_(4)
    return made


def asked(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def scored(lm, pairs=PAIRS):
    return lm.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)


def same(ours, theirs, atol=1e-4):
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    torch.testing.assert_close(
        torch.tensor([s for s, _ in ours]), torch.tensor([s for s, _ in theirs]), atol=atol, rtol=0
    )


def own_path(model, policy, ids):
    """The path of one unpadded prompt, alone in its forward."""
    model.enable_dynamic_routing(policy)
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        return model.routing.plan[0].tolist()
    finally:
        model.disable_dynamic_routing()


def spied(lm):
    """The paths along which `lm` scores, by context, filled as it does."""
    paths, score = {}, lm.evaluator.score_tokens

    def score_tokens(requests):
        for pairs, path in requests:
            for context, _ in pairs:
                paths.setdefault(tuple(context), set()).add(tuple(path))
        return score(requests)

    lm.evaluator.score_tokens = score_tokens
    return paths


# -- the dense model, against lm-eval's own class
def test_dense_scores_are_those_of_lm_eval(model, tokenizer, upstream):
    context = asked("generate_until", [("Two and two", {"max_gen_toks": 3, "until": []})])
    (written,) = upstream.generate_until(context, disable_tqdm=True)
    pairs = [*PAIRS, ("Two and two", written), ("Two and two", written[:2] + "~"), ("Two and two", "~" + written[1:])]
    ours, theirs = scored(RoutedLM(model, tokenizer), pairs), scored(upstream, pairs)
    same(ours, theirs)
    assert [greedy for _, greedy in ours][-3:] == [True, False, False]


@pytest.mark.parametrize("max_tokens", [8192, 60])
def test_dense_rolling_scores_are_those_of_lm_eval(model, tokenizer, upstream, max_tokens):
    texts = [("A short one.",), (LONG + LONG,), ("",), (LONG[:POSITIONS],), (LONG[: POSITIONS + 1],)]
    ours = RoutedLM(model, tokenizer, max_tokens=max_tokens).loglikelihood_rolling(
        asked("loglikelihood_rolling", texts), disable_tqdm=True
    )
    theirs = upstream.loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-3, rtol=0)
    assert ours[2] == 0 and ours[1] < 5 * ours[0]


def generations(upstream):
    """Contexts of mixed lengths, with stops that do occur."""
    free = {"max_gen_toks": 12, "until": []}
    contexts = ["Two and two", LONG, "?", "A much longer context, with words"]
    written = upstream.generate_until(asked("generate_until", [(text, free) for text in contexts]), disable_tqdm=True)
    stop = next(text[4] for text in written if text[4:5].isprintable())
    return [
        *((text, free) for text in contexts),
        *((text, {"max_gen_toks": 7, "until": [stop, "never"]}) for text in contexts),
        ("Two and two", {"until": stop, "max_new_tokens": 12, "do_sample": False, "temperature": 0.0}),
    ]


def test_special_tokens_are_no_text(tokenizer):
    model = small(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.pad_token_id] = model.lm_head.weight[tokenizer.encode("e")[0]] * 1.5
    requests = asked("generate_until", [(text, {"max_gen_toks": 12, "until": []}) for text, _ in PAIRS if text])
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu").generate_until(
        requests, disable_tqdm=True
    )
    assert RoutedLM(model, tokenizer).generate_until(requests, disable_tqdm=True) == theirs
    assert any(len(text) < 12 for text in theirs)


def test_dense_answers_are_those_of_lm_eval(model, tokenizer, upstream):
    requests = asked("generate_until", generations(upstream))
    theirs = upstream.generate_until(requests, disable_tqdm=True)
    for max_tokens in (8192, 30):
        ours = RoutedLM(model, tokenizer, max_tokens=max_tokens).generate_until(requests, disable_tqdm=True)
        assert ours == theirs
    assert len(set(theirs)) > 4 and any(len(short) < 7 for short in theirs[4:8])


# -- routed models
def test_routed_scores_are_those_of_edited_stacks(model, tokenizer, routers):
    lm = RoutedLM(model, tokenizer, policy=routers)
    paths, results = spied(lm), scored(lm)
    stacks = {}
    for (context, answer), (score, greedy) in zip(PAIRS, results, strict=True):
        stripped = context.rstrip()
        before = tokenizer.encode(stripped) or [tokenizer.eos_token_id]
        after = tokenizer.encode(context[len(stripped) :] + answer)
        path = tuple(own_path(model, routers, before[-POSITIONS:]))
        inputs = (before + after)[-POSITIONS - 1 :]
        assert paths[tuple(inputs[: -len(after)])] == {path}
        stack = stacks.setdefault(path, edited(model, path))
        with torch.no_grad():
            logp = stack(input_ids=torch.tensor([inputs[:-1]])).logits[0, -len(after) :].log_softmax(-1)
        assert abs(score - float(logp.gather(1, torch.tensor(after).unsqueeze(1)).sum())) < 1e-3
        assert greedy == (logp.argmax(-1).tolist() == after)
    assert len(stacks) > 3 and (1,) * LAYERS not in stacks
    assert not hasattr(model, "routing")


class ByFirstToken:
    """A policy that tells prompts apart which differ in where they begin."""

    def route(self, layer, prompts):
        return (prompts.input_ids[prompts.cu_seqlens[:-1].long()] + layer) % 3


def test_the_path_of_a_long_context(model, tokenizer):
    """Chosen by what the model can read of it, and not by what the answer leaves room for."""
    lm = RoutedLM(model, tokenizer, policy=ByFirstToken())
    paths, ids = spied(lm), tokenizer.encode(LONG)
    whole, readable, short = (
        own_path(model, ByFirstToken(), ids[start:]) for start in (0, -POSITIONS, -POSITIONS + 19)
    )
    assert readable != whole and readable != short
    scored(lm, [(LONG, "an answer of twenty."), (LONG, "!")])
    assert paths == {tuple(ids[start:]): {tuple(readable)} for start in (-POSITIONS + 19, -POSITIONS)}


def test_an_answer_is_written_along_its_contexts_path(model, tokenizer, routers):
    lm = RoutedLM(model, tokenizer, policy=routers)
    request = [("Two and two", {"max_gen_toks": 5, "until": []})]
    (written,) = lm.generate_until(asked("generate_until", request), disable_tqdm=True)
    path = own_path(model, routers, tokenizer.encode("Two and two"))
    ids = torch.tensor([tokenizer.encode("Two and two")])
    out = edited(model, path).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert written == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert written != RoutedLM(model, tokenizer).generate_until(asked("generate_until", request), disable_tqdm=True)[0]


def test_a_given_path(model, tokenizer, upstream):
    """Scores, answers and rolling scores are those of lm-eval's own class on an edited stack."""
    path = [1, 0, 2, 1]
    ours = RoutedLM(model, tokenizer, policy=path)
    theirs = HFLM(pretrained=edited(model, path), tokenizer=tokenizer, batch_size=2, device="cpu")
    same(scored(ours), scored(theirs))
    texts = asked("loglikelihood_rolling", [("Some text.",), (LONG + LONG,)])
    rolled = [lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (ours, theirs)]
    torch.testing.assert_close(*map(torch.tensor, rolled), atol=1e-3, rtol=0)
    requests = asked("generate_until", generations(upstream))
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("max_tokens", [1, 50, 200])
def test_company_does_not_matter(model, tokenizer, routers, max_tokens):
    """Neither the size of a forward, nor the order, nor which answers come along, nor the padding side."""
    whole = RoutedLM(model, tokenizer, policy=routers)
    paths, expected = spied(whole), scored(whole)
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(max_tokens)).tolist()
    lm = RoutedLM(model, tokenizer, policy=routers, max_tokens=max_tokens)
    again = spied(lm)
    tokenizer.padding_side = "right" if tokenizer.padding_side == "left" else "left"
    some = scored(lm, [PAIRS[i] for i in order[: len(order) // 2]])
    same(some, [expected[i] for i in order[: len(order) // 2]])
    same(scored(lm, [PAIRS[i] for i in order]), [expected[i] for i in order])
    assert again == paths and all(len(found) == 1 for found in paths.values())

    requests = [(text, {"max_gen_toks": 4, "until": []}) for text in dict.fromkeys(text for text, _ in PAIRS)]
    written = whole.generate_until(asked("generate_until", requests), disable_tqdm=True)
    backwards = lm.generate_until(asked("generate_until", requests[::-1]), disable_tqdm=True)
    assert backwards[::-1] == written


@pytest.mark.parametrize("max_tokens", [40, 80])
def test_forwards_are_as_wide_as_allowed(model, tokenizer, max_tokens):
    """However many answers a context has; one request that is wider goes alone."""
    lm = RoutedLM(model, tokenizer, max_tokens=max_tokens)
    widths, score = [], lm.evaluator.score_tokens

    def score_tokens(requests):
        widths.append(sum(len(pairs[0][0]) + sum(len(answer) for _, answer in pairs) for pairs, _ in requests))
        return score(requests)

    lm.evaluator.score_tokens = score_tokens
    answers = [f" the {number}th answer" for number in range(20)]
    scored(lm, [*(("Two and two", answer) for answer in answers), *((f"{answer}?", " no") for answer in answers)])
    wanted = 20 * 15 + 20 * 20 + 11 * len(widths)
    assert max(widths) <= max_tokens and len(widths) <= 2 * wanted / max_tokens
    widths.clear()
    scored(lm, [("?", LONG[:POSITIONS]), ("?", "!")] * 2)
    assert max(widths) <= max(max_tokens, POSITIONS + 1)


def test_the_models_own_routing(tokenizer, routers):
    model = small(tokenizer)
    expected, dense = scored(RoutedLM(model, tokenizer, policy=routers)), scored(RoutedLM(model, tokenizer))
    model.enable_dynamic_routing(routers)
    model(input_ids=torch.tensor([[5, 6, 7]]))
    plan = model.routing.plan
    same(scored(RoutedLM(model, tokenizer)), expected)
    same(scored(RoutedLM(model, tokenizer, policy=[1] * LAYERS)), dense)
    assert model.routing.policy is routers and torch.equal(model.routing.plan, plan)
    assert max(abs(a - b) for (a, _), (b, _) in zip(expected, dense, strict=True)) > 0.1


def test_half_the_answers_survive_a_stop(model, tokenizer, routers):
    """Answers reach lm-eval's cache as they come, and not at the end."""
    lm, kept = RoutedLM(model, tokenizer, policy=routers, max_tokens=50), []
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda kind, args, result: kept.append((kind, tuple(args), result))))
    score, calls = lm.evaluator.score_tokens, []

    def interrupted(requests):
        calls.append(requests)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(requests)

    lm.evaluator.score_tokens = interrupted
    with pytest.raises(KeyboardInterrupt):
        scored(lm)
    expected = dict(zip(PAIRS, scored(RoutedLM(model, tokenizer, policy=routers)), strict=True))
    assert 3 <= len(kept) < len(PAIRS)
    for kind, args, (result, _) in kept:
        assert kind == "loglikelihood" and abs(result - expected[args][0]) < 1e-4
    assert not hasattr(model, "routing")


# -- whole tasks
DOCUMENTS = [
    {"question": f"{word} is {i}?", "options": [f"{i} is", "none", f"no {word}"], "answer": i % 3}
    for i, word in enumerate(["north", "a tree", "why", "six", "all of it", "no", "two", "red"])
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks that need no network."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    quiz = common | {
        "task": "own_quiz",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    write = common | {
        "task": "own_writing",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "none",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (quiz, write):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def evaluate(model, tokenizer, folder, tasks=("own_quiz",), **more):
    return run_lm_eval(
        model, tokenizer, list(tasks), include_path=folder, include_defaults=False, bootstrap_iters=0, **more
    )


def by_hand(model, tokenizer, path_of):
    """Accuracy of the tasks' questions, each choice alone in a forward of an edited stack."""
    right = 0
    for document in DOCUMENTS:
        before = tokenizer.encode(f"Q: {document['question']}\nA:")
        stack, scores = edited(model, path_of(before)), []
        for option in document["options"]:
            after = tokenizer.encode(" " + option)
            with torch.no_grad():
                logp = stack(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            scores.append(float(logp.gather(1, torch.tensor(after).unsqueeze(1)).sum()))
        right += scores.index(max(scores)) == document["answer"]
    return right / len(DOCUMENTS)


def test_tasks_from_files(model, tokenizer, routers, folder, tmp_path):
    dense = evaluate(model, tokenizer, folder)["results"]["own_quiz"]["acc,none"]
    assert dense == by_hand(model, tokenizer, lambda ids: [1] * LAYERS)
    found = evaluate(model, tokenizer, folder, ["own_quiz", "own_writing"], policy=routers, use_cache=tmp_path / "kept")
    routed = found["results"]["own_quiz"]["acc,none"]
    assert routed == by_hand(model, tokenizer, lambda ids: own_path(model, routers, ids))
    assert len({dense, routed, 0.0}) == 3
    texts = [sample["resps"][0][0] for sample in found["samples"]["own_writing"]]
    assert len(set(texts)) > 1 and all(len(text) <= 5 for text in texts)

    # From the kept answers nothing runs: a model that could not run it is not asked.
    broken = small(tokenizer)
    broken.forward = None
    again = evaluate(broken, tokenizer, folder, ["own_quiz"], policy=[1] * LAYERS, use_cache=tmp_path / "kept")
    assert again["results"]["own_quiz"]["acc,none"] == routed


def test_limit_few_shots_and_chat(model, tokenizer, folder):
    def prompts(**more):
        samples = evaluate(model, tokenizer, folder, ["own_writing"], limit=2, **more)["samples"]["own_writing"]
        assert len(samples) == 2
        return [sample["arguments"][0][0] for sample in samples]

    chat = prompts(apply_chat_template=True, system_instruction="Be brief.")
    assert chat[0] == "<u>Be brief.<u>north is 0?<a>"
    assert prompts(num_fewshot=1)[0].endswith("\n\nnorth is 0?")


def test_a_budget_holds_while_the_tasks_run(model, tokenizer, folder):
    policy = StaticPolicy([1, 0, 3, 2], num_layers=LAYERS, budget=1.0)
    lines = evaluate(model, tokenizer, folder, policy=policy, budget=0.5)["samples"]["own_quiz"]
    forced = evaluate(
        model,
        tokenizer,
        folder,
        policy=own_path(model, StaticPolicy([1, 0, 3, 2], num_layers=LAYERS, budget=0.5), [5, 6]),
    )
    dense = evaluate(model, tokenizer, folder)["samples"]["own_quiz"]
    assert [s["resps"] for s in lines] == [s["resps"] for s in forced["samples"]["own_quiz"]]
    assert [s["resps"] for s in lines] != [s["resps"] for s in dense]
    assert policy.budget == 1.0


# -- what is refused
@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"do_sample": True, "temperature": 0.7}, NotImplementedError, "only greedy"),
        ({"temperature": 0.7}, NotImplementedError, "only greedy"),
        ({"num_beams": 4}, NotImplementedError, "only greedy"),
        ({"repetition_penalty": 1.2}, NotImplementedError, "repetition_penalty"),
        ({}, ValueError, "max_gen_toks is 256"),  # more than the positions
        ({"max_gen_toks": POSITIONS}, ValueError, f"less than the {POSITIONS} tokens"),
        ({"max_gen_toks": 0}, ValueError, "at least 1"),
    ],
)
def test_generation_that_is_refused(model, tokenizer, arguments, error, words):
    lm = RoutedLM(model, tokenizer)
    lm.evaluator.greedy_tokens = None  # nothing is written before all requests are looked at
    requests = asked("generate_until", [("fine", {"max_gen_toks": 3}), ("text", {"until": ["."], **arguments})])
    with pytest.raises(error, match=words):
        lm.generate_until(requests, disable_tqdm=True)


def test_what_else_is_refused(model, tokenizer, folder, routers):
    with pytest.raises(ValueError, match="a plan of 2 paths"):
        RoutedLM(model, tokenizer, policy=[[1] * LAYERS, [0] * LAYERS])
    with pytest.raises(ValueError, match="the path has 3 entries"):
        RoutedLM(model, tokenizer, policy=[1, 1, 1])
    with pytest.raises(ValueError, match="these routers are for"):
        RoutedLM(tiny("llama", seed=1, vocab_size=258), tokenizer, policy=routers)
    with pytest.raises(TypeError, match="not a policy"):
        RoutedLM(model, tokenizer, policy=3.5)
    with pytest.raises(ValueError, match="max_tokens"):
        RoutedLM(model, tokenizer, max_tokens=0)
    with pytest.raises(ValueError, match="no tokens of its own"):
        scored(RoutedLM(model, tokenizer), [("fine", " yes"), ("a", "")])
    with pytest.raises(ValueError, match=f"a continuation of {POSITIONS + 1} tokens"):
        scored(RoutedLM(model, tokenizer), [("fine", " yes"), ("a", LONG[: POSITIONS + 1])])
    with pytest.raises(ValueError, match=r"no tasks \['own_quizz'\]"):
        evaluate(model, tokenizer, folder, ["own_quiz", "own_quizz"])
    with pytest.raises(ValueError, match="list of one or more names"):
        run_lm_eval(model, tokenizer, "own_quiz")
    with pytest.raises(OSError, match="is no folder"):
        evaluate(model, tokenizer, folder / "nowhere")
    with pytest.raises(ValueError, match="keeps no budget"):
        evaluate(model, tokenizer, folder, policy=[1] * LAYERS, budget=0.5)
    with pytest.raises(ValueError, match="needs a policy"):
        evaluate(model, tokenizer, folder, budget=0.5)


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "drllm_fast.evaluation.lm")
    with pytest.raises(ImportError, match=r"pip install 'drllm-fast\[eval\]'"):
        importlib.import_module("drllm_fast.evaluation.lm")


def test_tokens_that_cannot_be_scored(model, tokenizer):
    evaluator = RoutedLM(model, tokenizer).evaluator
    for pairs in ([], [([], [3])], [([3], [])], [([3], [4]), ([3], [])]):
        with pytest.raises(ValueError, match="needs a token"):
            evaluator.score_tokens([(pairs, [1] * LAYERS)])
    with pytest.raises(ValueError, match="needs a token"):
        evaluator.greedy_tokens([([], [1] * LAYERS)], 3)
    with pytest.raises(ValueError, match=f"exceeds the model's {POSITIONS} positions"):
        evaluator.greedy_tokens([([3] * (POSITIONS - 2), [1] * LAYERS)], 3)


def test_defaults_of_torch_do_not_matter(model, tokenizer):
    evaluator, request = RoutedLM(model, tokenizer).evaluator, ([([3, 4], [5, 6]), ([3], [4])], [1] * LAYERS)
    expected = evaluator.score_tokens([request])[0]
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        found = evaluator.score_tokens([request])[0]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected)) and found[0].dtype == torch.float32


# -- a real model
def test_scores_of_lm_eval_on_a_real_model():
    from drllm_fast.smollm2 import load_smollm2

    model, tokenizer = load_smollm2(torch.float32, progress=False)
    context = "Question: Which of these melts when it is held in a warm hand?\nAnswer:"
    pairs = [(context, choice) for choice in (" a pebble from a river", " an ice cube", " a wooden spoon")]
    pairs += [("The capital of France is", " Paris"), ("", "Once upon a time"), ("Fill in: ", "the blank")]
    theirs = scored(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"), pairs)
    same(scored(RoutedLM(model, tokenizer), pairs), theirs, atol=1e-3)
