"""The search on SmolLM2-135M-Instruct: scores as Hugging Face and lm-eval compute them, and a tree that branches."""

import pytest
import torch
from oracles import edited

from drllm_fast.search import PathEvaluator
from drllm_fast.search.base import Outcome
from drllm_fast.search.searcher import make_searcher
from drllm_fast.search.tokens import encode_pair, encode_prompt
from drllm_fast.search.unit import SearchConfig
from drllm_fast.smollm2 import load_smollm2

CONTEXT = "Question: Which of these melts when it is held in a warm hand?\nAnswer:"
CHOICES = [" a pebble from a river", " an ice cube", " a wooden spoon", " an iron nail"]
EDITS = [{}, {19: 0}, {0: 2}, {29: 2, 3: 0}, {19: 0, 20: 0, 27: 2}, {5: 2, 6: 2, 7: 0}]
PATHS = [[edit.get(layer, 1) for layer in range(30)] for edit in EDITS]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return load_smollm2(torch.float32, progress=False)


@pytest.fixture(scope="module")
def expected(model_and_tokenizer):
    """[P, C] and greedy answers, of Hugging Face's model with an edited stack."""
    model, tokenizer = model_and_tokenizer
    scores, answers = [], []
    prompt = torch.tensor([encode_prompt(tokenizer, "3 + 4 = 7\n5 + 1 = 6\n2 + 6 =")])
    for path in PATHS:
        alone, row = edited(model, path), []
        for choice in CHOICES:
            before, after = encode_pair(tokenizer, CONTEXT, choice)
            with torch.no_grad():
                logp = alone(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            row.append(float(logp.gather(1, torch.tensor(after).unsqueeze(1)).sum()))
        scores.append(row)
        out = alone.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        tokens = out[0, prompt.shape[1] :].tolist()
        end = tokenizer.eos_token_id
        answers.append(tokens[: tokens.index(end)] if end in tokens else tokens)
    return torch.tensor(scores), answers


@pytest.mark.parametrize("size", [1 << 30, 0, 1_000_000], ids=["store on", "store off", "store tiny"])
def test_scores_and_answers_of_edited_stacks(model_and_tokenizer, expected, size):
    evaluator = PathEvaluator(*model_and_tokenizer, store_bytes=size)
    scores, answers = expected
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0]):  # the second time from the store, as far as it is there
        paths = [PATHS[i] for i in order]
        torch.testing.assert_close(evaluator.score_choices(CONTEXT, CHOICES, paths), scores[order], atol=2e-3, rtol=0)
        assert evaluator.greedy("3 + 4 = 7\n5 + 1 = 6\n2 + 6 =", paths, 6) == [answers[i] for i in order]
    assert len({tuple(answer) for answer in answers}) > 1 and scores.std(0).min() > 0.1


def test_scores_of_lm_eval(model_and_tokenizer):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model, tokenizer = model_and_tokenizer
    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    asked = [Instance("loglikelihood", {}, (CONTEXT, choice), i) for i, choice in enumerate(CHOICES)]
    theirs = torch.tensor([score for score, _ in lm.loglikelihood(asked, disable_tqdm=True)])
    ours = PathEvaluator(model, tokenizer).score_choices(CONTEXT, CHOICES, [1] * 30)
    torch.testing.assert_close(ours[0], theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("reward", ["exact", "margin"])
def test_the_tree_branches(model_and_tokenizer, reward):
    """200 simulations of a prompt: at least 5 children at the root, and children of children."""
    evaluator = PathEvaluator(*model_and_tokenizer)

    def outcomes(paths):
        for row in evaluator.score_choices(CONTEXT, CHOICES, paths).tolist():
            margin = row[1] - max(row[:1] + row[2:])
            yield Outcome(float(margin > 0) if reward == "exact" else margin, margin > 0)

    config = SearchConfig(simulations=200, early_stop=False, reward=reward)
    search = make_searcher(config, 30, next(outcomes([[1] * 30])), seed=0)
    while not search.done:
        for path, outcome in zip(paths := search.ask(8), outcomes(paths), strict=True):
            search.tell(path, outcome)
    children = search.root.children
    assert len(search.told) == 201
    assert len(children) >= 5
    assert sum(len(child.children) >= 2 for child in children) >= 3
    assert max(sum(times != 1 for times in path) for path in search.told) >= 4  # and it is deep
