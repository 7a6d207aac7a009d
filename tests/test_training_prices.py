"""Prices of blocks: costs fitted to measured paths, orders found over them, and the lesson that routers are taught."""

import itertools
import json
import math

import pytest
import torch
from cli_cases import LAYERS, call, ended, quiz, refused, tiny_folder

from drllm_fast import LayerRouters, StaticPolicy
from drllm_fast.cli_models import Dtype, load_model
from drllm_fast.paths import route_paths
from drllm_fast.search import read_store
from drllm_fast.training.orders import (
    Orders,
    PlaceObjective,
    balanced,
    find_orders,
    shared_order,
    spread_steps,
    supported,
)
from drllm_fast.training.prices import CostModel, Measurements, features, load_measurements
from drllm_fast.training.windows import WindowSet

BLOCKS = 6


def pair_cost(z, paths):
    """A known cost with interactions, which depends on the sign of z[0]: blocks 2 and 3 are cheap together where it is
    positive, blocks 0 and 5 where it is not."""
    skipped, repeated = (paths == 0).double(), (paths == 2).double()
    alone = torch.tensor([0.5, 0.9, 0.4, 0.4, 0.8, 0.5], dtype=torch.float64)
    total = skipped @ alone + 0.3 * repeated @ alone.flip(0)
    kind = (z[:, 0] > 0).double()
    total = total - kind * 0.6 * skipped[:, 2] * skipped[:, 3] - (1 - kind) * 0.8 * skipped[:, 0] * skipped[:, 5]
    return total.float()


def measured(prompts=300, each=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(prompts, 3, generator=generator)
    owner = torch.arange(prompts).repeat_interleave(each)
    weights = torch.tensor([0.35, 0.5, 0.15])
    drawn = torch.multinomial(weights, prompts * each * BLOCKS, replacement=True, generator=generator)
    paths = drawn.view(-1, BLOCKS).to(torch.int8)
    groups = ["positive" if value > 0 else "negative" for value in z[:, 0].tolist()]
    return z, Measurements([(n,) for n in range(prompts)], groups, owner, paths, pair_cost(z[owner], paths))


def test_costs_are_foretold_and_features_matter():
    z, data = measured()
    model, quality = CostModel.fit(z, data, members=2, width=48, epochs=20, batch=128, progress=False)
    assert quality["features"]["all"] > 0.95
    assert quality["paths alone"]["all"] < quality["features"]["all"] - 0.01
    assert set(quality["features"]) == {"all", "positive", "negative"}
    fresh_z, fresh = measured(40, 8, seed=5)
    told = model(fresh_z[fresh.owner], fresh.paths)
    assert told.dtype == torch.float32 and (told >= 0).all()
    error = (told.sqrt() - fresh.costs.sqrt()).square().mean() / fresh.costs.sqrt().var()
    assert error < 0.05
    again, _ = CostModel.fit(z, data, members=2, width=48, epochs=20, batch=128, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.weights, again.weights, strict=True))
    bolder = CostModel(model.weights, spread=0.0)(fresh_z[fresh.owner], fresh.paths)
    assert (bolder <= told + 1e-6).all() and (bolder < told).any()


def brute_force(z, to, length):
    """The nested sequence of the smallest sum of costs along the way."""

    def total(sequence):
        out = 0.0
        for n in range(1, length + 1):
            path = torch.ones(1, BLOCKS, dtype=torch.int8)
            path[0, list(sequence[:n])] = to
            out += float(pair_cost(z, path))
        return out

    return min(map(total, itertools.permutations(range(BLOCKS), length))), total


@pytest.mark.parametrize("to, length", [(0, 3), (2, 2)])
def test_orders_are_the_best_nested_sequences(to, length):
    z, _ = measured(6)
    every = torch.ones(BLOCKS, dtype=torch.bool)
    orders = find_orders(
        pair_cost, z, skippable=every, repeatable=every, skips=3, repeats=2, beam=200, chunk=4, progress=False
    )
    found = orders.skips if to == 0 else orders.repeats
    for row, sequence in zip(z, found.tolist(), strict=True):
        best, total = brute_force(row.unsqueeze(0), to, length)
        assert len(set(sequence)) == length
        assert total(sequence) == pytest.approx(best, abs=1e-5)


def test_only_allowed_blocks_are_in_an_order_and_too_few_are_refused():
    z, data = measured(5)
    allowed = torch.tensor([True, False, True, False, False, True])
    orders = find_orders(pair_cost, z, skippable=allowed, repeatable=allowed, skips=3, repeats=1, progress=False)
    assert set(orders.skips.flatten().tolist()) == {0, 2, 5}
    with pytest.raises(ValueError, match="skips=4, but measured paths have changed only 3"):
        find_orders(pair_cost, z, skippable=allowed, repeatable=allowed, skips=4, repeats=1, progress=False)
    paths = torch.ones(200, 3, dtype=torch.int8)
    paths[0, 0], paths[:2, 1], paths[5, 2] = 0, 0, 2
    assert supported(paths, 0, share=0.006).tolist() == [False, True, False]
    assert supported(paths, 2, share=0.005).tolist() == [False, False, True]


def test_the_shared_order_is_best_on_the_average():
    z, _ = measured(12)
    every = torch.ones(BLOCKS, dtype=torch.bool)
    found = shared_order(pair_cost, z, skippable=every, skips=2).tolist()

    def total(sequence):
        path = torch.ones(1, BLOCKS, dtype=torch.int8)
        out = 0.0
        for block in sequence:
            path[0, block] = 0
            out += float(pair_cost(z, path.expand(len(z), -1)).mean())
        return out

    assert total(found) == pytest.approx(min(map(total, itertools.permutations(range(BLOCKS), 2))), abs=1e-5)


def test_places_and_paths():
    orders = Orders(4, torch.tensor([[2, 0], [1, 3]]), torch.tensor([[3], [0]]))
    assert orders.places()[..., 0].tolist() == [[2, 3, 1, 3], [3, 1, 3, 2]]
    assert orders.places()[..., 1].tolist() == [[2, 2, 2, 1], [1, 2, 2, 2]]
    rows, steps = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 1, 2, -1, 2])
    assert orders.paths(rows, steps).tolist() == [
        [1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 0], [2, 1, 1, 1], [0, 1, 0, 1],
    ]  # fmt: skip


def test_lengths_are_spread_and_small_groups_read_along_more():
    groups = ["large"] * 50 + ["small"] * 2
    rows, steps = spread_steps(groups, skips=4, repeats=1, each=3, least=40)
    of_large, of_small = rows < 50, rows >= 50
    assert of_large.sum() == 150 and of_small.sum() == 40
    for prompt in range(50):
        assert len(set(steps[rows == prompt].tolist())) == 3
    assert set(steps[of_small].tolist()) == {-1, 0, 1, 2, 3, 4}
    shares = [(steps[of_large] == length).float().mean() for length in (-1, 2)]
    assert shares[0] < shares[1] / 2
    assert all(torch.equal(a, b) for a, b in zip(
        spread_steps(groups, skips=4, repeats=1, each=3, least=40), (rows, steps), strict=True))  # fmt: skip
    picked = balanced(groups, 5)
    assert len(picked) == 7 and {50, 51} <= set(picked.tolist())


def test_the_objective_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 2, 3, generator=generator).double()  # [L, B, 3]
    places = torch.randint(1, 5, (2, 5, 2), generator=generator).float()
    losses = PlaceObjective(3, 2, tau=0.5)(logits, places)
    for row in range(2):
        expected = 0.0
        for other, column, count in ((0, 0, 3), (2, 1, 2)):
            terms = []
            for layer in range(5):
                margin = float(logits[layer, row, 1] - logits[layer, row, other])
                for threshold in [n + 0.5 for n in range(count + 1)]:
                    p = 1 / (1 + math.exp(-(margin - threshold) / 0.5))
                    stays = float(places[row, layer, column]) > threshold
                    terms.append(-math.log(p if stays else 1 - p))
            expected += sum(terms) / len(terms)
        assert float(losses[row]) == pytest.approx(expected, rel=1e-6)


def test_features_tell_prompts_apart_and_ignore_unused_windows():
    generator = torch.Generator().manual_seed(0)
    pooled, counts = torch.randn(6, 20, 3, 8, generator=generator), torch.randint(1, 4, (20,), generator=generator)
    unused = torch.arange(3) >= counts.unsqueeze(1)
    pooled.masked_fill_(unused.view(1, 20, 3, 1), 0)
    z = features(WindowSet(pooled, counts), 4)
    assert z.shape == (20, 4)
    assert torch.allclose(z.T @ z / 20, torch.eye(4), atol=1e-4)  # uncorrelated, of unit variance


@pytest.fixture(scope="module")
def priced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("priced")
    model, other = (tiny_folder(folder / name, seed=seed) for seed, name in enumerate(("tiny", "other")))
    task = quiz(folder / "quiz.jsonl", 12)
    common = ("search", "--model", model, "--task", task, "--threads", 1, "--no-control", "--probes", 0)
    spread = ("--method", "spread", "--no-early-stop", "--simulations", 12, "--prior", "kl", "--option", "skips=2")
    ended(call(*common, *spread, "--reward", "kl", "--output", folder / "kl"))
    ended(call(*common, *spread, "--reward", "kl", "--seed", 1, "--output", folder / "more"))
    ended(call(*common, "--simulations", 4, "--output", folder / "exact"))
    return model, other, folder


def test_measurements_are_what_was_stored(priced):
    tiny, _, folder = priced
    model, tokenizer = load_model(str(tiny), Dtype.auto, "cpu")
    data = load_measurements([folder / "kl", folder / "more"], tokenizer=tokenizer, model=model)
    with read_store(folder / "kl") as store:
        stored = {tuple(map(int, path)): -value for r in store.results() if r.key.item == next(
            iter(store.results())).key.item for path, value in zip(r.paths, r.rewards, strict=True)}  # fmt: skip
    assert len(data.tokens) == len(set(data.tokens)) == 12  # prompts of both searches are one
    assert data.paths.shape == (12 * 24, LAYERS) and data.costs.shape == (12 * 24,)
    first = [tuple(path) for path, owner in zip(data.paths.tolist(), data.owner.tolist(), strict=True) if owner == 0]
    assert set(stored) - {(1,) * LAYERS} <= set(first)
    costs = dict(zip(first, data.costs[data.owner == 0].tolist(), strict=True))
    assert all(costs[path] == pytest.approx(value, abs=1e-5) for path, value in stored.items() if path in costs)
    with pytest.raises(ValueError, match="reward 'exact', which prices nothing"):
        load_measurements([folder / "exact"], tokenizer=tokenizer, model=model)


def test_the_command_learns_prices(priced, tmp_path):
    tiny, other, folder = priced
    quick = (
        "--epochs", 30, "--batch-size", 8, "--router-size", 16, "--windows", 3, "--tracker", "none", "--threads", 1,
        "--skips", 2, "--repeats", 1, "--lengths", 2, "--lr", 0.01,
    )  # fmt: skip
    given = ("--prices", folder / "kl", "--prices", folder / "more")
    result = ended(call("train", "--model", tiny, *given, "--output", tmp_path / "routers", *quick))
    assert f"{12 * 24} measured paths of 12 prompts" in result.stderr
    report = json.loads((tmp_path / "routers" / "report.json").read_text())
    assert report["paths"] == ["kl", "more"] and report["measured_paths"] == 288
    assert all(len(blocks) == 2 for blocks in report["left_out_first"].values())
    static = StaticPolicy.load(tmp_path / "routers" / "prices.json")
    assert static.criterion == "prices" and len(static.order) == 2

    # A penalty is a threshold on places: between k and k + 1 it leaves out about k blocks.
    model, tokenizer = load_model(str(tiny), Dtype.auto, "cpu")
    data = load_measurements([folder / "kl"], tokenizer=tokenizer, model=model)
    routers = LayerRouters.from_pretrained(tmp_path / "routers")
    shares = []
    for penalty in (-1.5, 0.0, 1.5, 2.5):
        routers.penalty = penalty
        shares.append(float(route_paths(model, data.tokens, routers).float().mean()) * LAYERS - LAYERS)
    assert shares[0] > 0.5 and abs(shares[1]) < 0.3 and -1.6 < shares[2] < -0.5 and -2.6 < shares[3] < -1.4

    refused(call("train", "--model", other, *given, "--output", tmp_path / "no", *quick), "holds paths of")
    refused(
        call("train", "--model", tiny, "--output", tmp_path / "no", *quick), "give --paths FOLDER or --prices FOLDER"
    )
    both = (*given, "--paths", folder / "exact")
    refused(call("train", "--model", tiny, *both, "--output", tmp_path / "no", *quick), "one of the three")
    many = (*quick, "--skips", LAYERS + 1)
    refused(call("train", "--model", tiny, *given, "--output", tmp_path / "no", *many), "changed only")
