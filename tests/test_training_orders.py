"""Orders of blocks by measuring: what paths cost, greedy elimination, and routers that learn the orders of kinds."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from cli_cases import LAYERS, call, ended, quiz, refused, tiny_folder

from drllm_fast import LayerRouters, StaticPolicy, disable_dynamic_routing, enable_dynamic_routing
from drllm_fast.cli_models import Dtype, load_model
from drllm_fast.paths import route_paths
from drllm_fast.search.evaluator import PathEvaluator
from drllm_fast.search.tasks import load_task
from drllm_fast.search.tokens import encode_pair
from drllm_fast.search.unit import Item
from drllm_fast.training import elimination
from drllm_fast.training.block_order import FILE, BlockOrder, order_lesson
from drllm_fast.training.elimination import PathCosts, eliminate

BLOCKS = 6


def pair_cost(path):
    """Blocks 1 and 4 are dear alone and cheap together; 0, 3 and 5 add up."""
    skipped = [times == 0 for times in path]
    alone = (0.3, 0.5, 2.0, 0.4, 0.5, 0.6)
    return sum(itertools.compress(alone, skipped)) - 0.9 * (skipped[1] and skipped[4])


def counted(cost, calls):
    def costs(paths, count, progress=False):
        calls.append((list(paths), count))
        return torch.tensor([cost(path) for path in paths])

    return costs


def brute_force(length):
    def total(sequence):
        paths = [[0 if b in sequence[:k] else 1 for b in range(BLOCKS)] for k in range(1, length + 1)]
        return sum(pair_cost(path) / k**2 for k, path in enumerate(paths, 1))

    return min(itertools.permutations(range(BLOCKS), length), key=total)


def test_elimination_finds_the_best_sequence():
    calls = []
    wide, way = eliminate(
        counted(pair_cost, calls), num_layers=BLOCKS, to=0, length=3, count=40, beam=64, progress=False
    )
    assert tuple(wide) == brute_force(3)
    assert way == pytest.approx([pair_cost([0 if b in wide[:k] else 1 for b in range(BLOCKS)]) for k in (1, 2, 3)])
    assert {count for _, count in calls} <= {5, 20, 40}
    greedy, _ = eliminate(counted(pair_cost, []), num_layers=BLOCKS, to=0, length=3, count=40, beam=1, progress=False)
    assert greedy == [0, 3, 1]  # one block after the other, the pair stays unseen
    pooled = []
    found, _ = eliminate(
        counted(pair_cost, pooled), num_layers=BLOCKS, to=0, length=2, count=40, beam=1, pool=3, progress=False
    )
    assert found == [0, 3]
    tried = {
        block
        for paths, _ in pooled
        for path in paths
        for block in range(BLOCKS)
        if path.count(0) == 2 and path[block] == 0
    }
    assert len(tried) == 3 and 2 not in tried
    repeats, _ = eliminate(
        counted(lambda path: float(path.index(2)) if 2 in path else 0.0, []),
        num_layers=BLOCKS, to=2, length=1, count=1, progress=False,
    )  # fmt: skip
    assert repeats == [0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model, other = (tiny_folder(folder / name, seed=seed) for seed, name in enumerate(("tiny", "other")))
    return model, other, quiz(folder / "quiz.jsonl", 9)


def by_hand(model, tokenizer, item, path):
    """KL and NLL of an item from whole forwards of the routed model, one for each choice."""
    choices = item.choices if item.choices is not None else (f" {item.answer}",)
    scores, divergences = [], {}
    for choice in choices:
        context, answer = encode_pair(tokenizer, item.prompt, choice)
        ids = torch.tensor([[*context, *answer]])
        told = {}
        for name, one in (("dense", [1] * LAYERS), ("path", list(path))):
            enable_dynamic_routing(model, one)
            with torch.no_grad():
                told[name] = model(ids, use_cache=False).logits[0, len(context) - 1 : -1].log_softmax(-1)
            disable_dynamic_routing(model)
        scores.append(float(told["path"].gather(1, ids[0, len(context) :, None]).sum()))
        for place in range(len(answer)):  # each place once, however many choices share it
            key = (*context, *answer[:place])
            divergences[key] = float(
                F.kl_div(told["path"][place], told["dense"][place], log_target=True, reduction="sum")
            )
    if len(choices) == 1:
        nll = -scores[0] / len(answer)
    else:
        nll = -float(torch.tensor(scores).log_softmax(0)[int(item.answer)])
    return sum(divergences.values()) / len(divergences), nll


def test_costs_are_those_of_whole_forwards(tiny, tmp_path, monkeypatch):
    model, tokenizer = load_model(str(tiny[0]), Dtype.auto, "cpu")
    items = [
        *load_task(str(tiny[2]))[:3],
        Item("free", "sums", "1 + 1 =", None, "2 or so"),
        Item("text", "text", "once", (" upon a time",), 0),
    ]
    paths = [(1, 0, 1, 1), (0, 1, 2, 1), (1, 0, 0, 1)]
    expected = torch.tensor([[by_hand(model, tokenizer, item, path) for item in items] for path in paths])
    file = tmp_path / "paths.jsonl"
    costs = PathCosts(PathEvaluator(model, tokenizer), items, label_weight=0.25, file=file)
    found = costs.measures(paths, len(items))
    assert torch.allclose(found, expected, atol=2e-5)
    dense = torch.tensor([by_hand(model, tokenizer, item, (1,) * LAYERS)[1] for item in items])
    whole = 0.75 * expected[..., 0] + 0.25 * (expected[..., 1] - dense)
    assert torch.allclose(costs.each(paths), whole, atol=2e-5)
    assert torch.allclose(costs(paths, 2), whole[:, :2].mean(1), atol=2e-5)
    assert float(costs([costs.dense])) == pytest.approx(0, abs=2e-6)

    class Deaf:
        """An evaluator that measures nothing."""

        def __init__(self, evaluator):
            self.tokenizer, self.num_layers = evaluator.tokenizer, evaluator.num_layers
            self.top, self.decoder = evaluator.top, evaluator.decoder

    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines) + lines[-1][:20])  # killed while it wrote
    again = PathCosts(Deaf(costs.evaluator), items, label_weight=0.25, file=file)
    assert torch.equal(again.each(paths), costs.each(paths))
    assert file.read_text() == "".join(lines)

    # Measured bit by bit, by several runs of which one was killed between two paths.
    monkeypatch.setattr(elimination, "AT_ONCE", 2)
    grown = tmp_path / "grown.jsonl"
    for some, count in ((paths[:1], 1), (paths[1:], 3), (paths, 4)):
        PathCosts(costs.evaluator, items, file=grown).measures(some, count)
    grown.write_text("".join(grown.read_text().splitlines(keepends=True)[:-2]))
    assert torch.allclose(PathCosts(costs.evaluator, items, file=grown).measures(paths, 5), expected, atol=2e-5)
    with pytest.raises(ValueError, match="other prompts, another model or in another dtype"):
        PathCosts(costs.evaluator, items[1:], file=file)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_refused_costs(tiny, weight):
    model, tokenizer = load_model(str(tiny[0]), Dtype.auto, "cpu")
    evaluator = PathEvaluator(model, tokenizer)
    with pytest.raises(ValueError, match="label_weight must be from 0"):
        PathCosts(evaluator, [Item("i", "t", "a", (" b",), 0)], label_weight=weight)
    with pytest.raises(ValueError, match="no prompts to measure"):
        PathCosts(evaluator, [])


def test_a_command_from_orders_to_routers(tiny, tmp_path):
    """Two kinds of prompts with orders of their own: routers learn to tell them apart, at every penalty."""
    folder, other, task = tiny
    common = ("order", "--model", folder, "--threads", 1, "--skips", 2, "--repeats", 1)
    asked = (*common, "--task", task, "--output", tmp_path / "quiz", "--label-weight", 0.5)
    result = ended(call(*asked))
    assert "measuring 9 prompts of the kind quiz" in result.stderr
    made = BlockOrder.load(tmp_path / "quiz")
    assert len(made.skips) == 2 and len(made.repeats) == 1 and len(made.prompts) == 9 and made.measured == 9
    model, tokenizer = load_model(str(folder), Dtype.auto, "cpu")
    costs = PathCosts(PathEvaluator(model, tokenizer), load_task(str(task)), label_weight=0.5)
    singles = [tuple(0 if b == block else 1 for b in range(LAYERS)) for block in range(LAYERS)]
    pairs = [tuple(0 if b in two else 1 for b in range(LAYERS)) for two in itertools.combinations(range(LAYERS), 2)]
    first, second = tuple(0 if b == made.skips[0] else 1 for b in range(LAYERS)), made.static()
    second.budget = 1 - 2 / LAYERS
    assert made.skip_costs == pytest.approx(costs([first, second.path]).tolist(), abs=1e-5)
    ranked = costs(singles)[made.skips[0]] + costs([second.path])[0] / 4
    best = min(float(costs(singles)[b] + costs([pair])[0] / 4) for pair in pairs for b in range(LAYERS) if pair[b] == 0)
    assert float(ranked) == pytest.approx(best, abs=1e-4)
    assert StaticPolicy.load(tmp_path / "quiz" / "static.json").order == made.skips

    before = (tmp_path / "quiz" / "measuring" / "paths.jsonl").read_text()
    ended(call(*asked))  # goes on where it stopped, which is at its end
    assert (tmp_path / "quiz" / "measuring" / "paths.jsonl").read_text() == before

    # Another kind, with an order that is the other way round.
    turned = [block for block in range(LAYERS) if block not in made.skips]
    data = json.loads((tmp_path / "quiz" / FILE).read_text())
    data |= {"kind": "turned", "skips": turned, "prompts": [[n + 3] * 5 for n in range(9)], "skip_costs": [0.1, 0.2]}
    (tmp_path / "turned").mkdir()
    (tmp_path / "turned" / FILE).write_text(json.dumps(data))
    given = ("--orders", tmp_path / "quiz", "--orders", tmp_path / "turned")
    quick = (
        "--epochs", 20, "--batch-size", 8, "--router-size", 16, "--windows", 3, "--tracker", "none", "--threads", 1,
        "--lr", 0.02, "--warmup", 10,
    )  # fmt: skip
    ended(call("train", "--model", folder, *given, "--output", tmp_path / "routers", *quick))
    report = json.loads((tmp_path / "routers" / "report.json").read_text())
    assert report["kinds"]["turned"]["skips"] == turned and report["kinds"]["quiz"]["label_weight"] == 0.5
    routers = LayerRouters.from_pretrained(tmp_path / "routers")
    for order in (made, BlockOrder.load(tmp_path / "turned")):
        for steps in (0, 1, 2):
            routers.penalty = steps + 0.5
            expected = [0 if block in order.skips[:steps] else 1 for block in range(LAYERS)]
            paths = route_paths(model, order.prompts, routers)
            assert (paths == torch.tensor(expected, dtype=paths.dtype)).all(1).float().mean() > 0.8, (order.kind, steps)

    refused(call("train", "--model", other, *given, "--output", tmp_path / "no", *quick), "the order of quiz is of")
    twice = ("--orders", tmp_path / "quiz", "--orders", tmp_path / "quiz")
    refused(call("train", "--model", folder, *twice, "--output", tmp_path / "no", *quick), "two orders are of the kind")
    refused(call("train", "--model", folder, "--orders", tmp_path, "--output", tmp_path / "no", *quick), "no order of")
    refused(call(*common, "--task", task, "--output", folder), "is not empty and no output of a measuring")
    refused(call(*asked[:-4], "--output", tmp_path / "slash", "--kind", "a/b"), "a name without a slash")
    longer = ("--skips", LAYERS + 1)
    refused(call(*asked[:-4], "--output", tmp_path / "long", *longer), f"the model has {LAYERS} blocks")


def test_refused_orders(tiny, tmp_path):
    model, _ = load_model(str(tiny[0]), Dtype.auto, "cpu")
    with pytest.raises(ValueError, match="no orders to learn"):
        order_lesson(model, [])
    (tmp_path / FILE).write_text("{")
    with pytest.raises(OSError, match="damaged"):
        BlockOrder.load(tmp_path)
    (tmp_path / FILE).write_text('{"format": "drllm-fast block order", "version": 2}')
    with pytest.raises(ValueError, match="no order of blocks that this version reads"):
        BlockOrder.load(tmp_path)
