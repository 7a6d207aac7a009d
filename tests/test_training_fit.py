"""Training on stored windows: what it learns, that it can be cut off anywhere, and what it refuses."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drllm_fast.router_reference import decide, router_windows
from drllm_fast.routers import LayerRouters
from drllm_fast.training.fit import fit
from drllm_fast.training.fit_checkpoint import FILE
from drllm_fast.training.fit_config import FitConfig
from drllm_fast.training.groups import Part, cvar, draw, oversampled, worst
from drllm_fast.training.windows import WindowSet

LAYERS, WINDOWS, WIDTH = 3, 4, 6
CONFIG = FitConfig(epochs=4, batch_size=8, learning_rate=3e-3, warmup_steps=5)


def data(prompts=60, noise=0.3, seed=0):
    """Prompts whose class at each block is where their windows point, among WINDOWS windows or fewer."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 3, (prompts, LAYERS), generator=g)
    counts = torch.randint(1, WINDOWS + 1, (prompts,), generator=g)
    pooled = noise * torch.randn(LAYERS, prompts, WINDOWS, WIDTH, generator=g)
    pooled[..., :3] += torch.nn.functional.one_hot(targets.T, 3).unsqueeze(2)
    pooled[:, torch.arange(WINDOWS) >= counts.unsqueeze(1)] = 0
    return WindowSet(pooled, counts), targets


def new_routers(seed=0, layers=LAYERS, width=WIDTH):
    return LayerRouters(
        num_layers=layers, hidden_size=width, router_size=16, windows=WINDOWS,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def run(config=CONFIG, given=None, routers=None, **options):
    windows, targets = data() if given is None else given
    routers = new_routers() if routers is None else routers
    return routers, fit(routers, windows, targets, config=config, progress=False, **options)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def timeless(report):
    values = report.to_dict()
    for epoch in values["epochs"]:
        epoch.pop("seconds")
    values.pop("seconds")
    return values


def change(config, **changes):
    return FitConfig(**{**config.__dict__, **changes})


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_learns_what_can_be_learned(soft, dtype):
    windows, targets = data(prompts=120, noise=0.1)
    windows = WindowSet(windows.pooled.to(dtype), windows.counts)
    given = torch.nn.functional.one_hot(targets, 3).float() * 0.9 + 0.1 / 3 if soft else targets
    routers, report = run(change(CONFIG, epochs=15, learning_rate=1e-2), (windows, given))
    with torch.no_grad():
        logits = router_windows(windows.pooled, windows.counts, *routers.parameters())
    assert torch.equal(decide(logits), targets.T.to(torch.int8))
    first, last = report.epochs[0], report.epochs[-1]
    assert last.train_loss < first.train_loss and last.validation_loss < first.validation_loss
    assert last.metrics["macro_f1"] == 1 and last.metrics["visits"] == pytest.approx(
        targets[report.validation].double().sum(1).mean().item()
    )


def test_steps_are_those_of_adamw_on_the_mean_of_the_batch():
    """Two epochs against the same steps written out, prompt by prompt and layer by layer."""
    windows, targets = data(prompts=20)
    config = FitConfig(epochs=2, batch_size=16, warmup_steps=1, validation=0.0, gamma=0.0, balance="none")
    routers, report = run(config, (windows, targets))
    expected = new_routers()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1.0, weight_decay=0.01)
    # Four steps: one of warm-up, then the cosine from its top.
    for step, rate in enumerate([1e-3, 1e-3, 0.75e-3, 0.25e-3]):
        order = draw(np.random.default_rng([0, 1 + step // 2]), np.full(20, 1 / 20))
        rows = torch.from_numpy(order[:16] if step % 2 == 0 else order[16:])
        losses = []
        for layer in range(LAYERS):
            w1, b1, w2, b2 = (p[layer] for p in expected.parameters())
            for row in rows.tolist():
                used = windows.pooled[layer, row, : windows.counts[row]]
                logits = (torch.nn.functional.gelu(used @ w1.T + b1, approximate="tanh") @ w2.T + b2).mean(0)
                losses.append(torch.nn.functional.cross_entropy(logits, targets[row, layer]))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    for ours, theirs in zip(routers.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)
    assert report.validation == [] and report.epochs[-1].metrics is None and report.epochs[-1].validation_loss is None


def test_rates():
    config = FitConfig(learning_rate=2.0, warmup_steps=4)
    rates = [config.rate(step, 20) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[12] == pytest.approx(1.0) and rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert [change(config, schedule="constant").rate(step, 20) for step in (4, 19)] == [2.0, 2.0]
    assert FitConfig().warmup(100) == 25 and FitConfig().warmup(10_000) == 500
    assert FitConfig().rate(0, 2) > 0  # no room for a warm-up


def test_same_seed_same_routers_and_the_callers_random_numbers_stay():
    torch.manual_seed(3), np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    (a, report), (b, again), (c, other) = run(), run(), run(change(CONFIG, seed=1))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert same(a, b) and timeless(report) == timeless(again)
    assert not same(a, c) and report.validation != other.validation


def test_validation_is_of_whole_prompts_that_are_not_trained_on():
    windows, targets = data()
    routers, report = run(given=(windows, targets))
    assert len(report.validation) == 6 and report.training == 54
    assert sum(report.class_counts) == 54 * LAYERS
    spoilt = windows.pooled.clone()
    spoilt[:, report.validation] = 7.0
    others = targets.clone()
    others[report.validation] = 2 - others[report.validation]
    unmoved, changed = run(given=(WindowSet(spoilt, windows.counts), others))
    assert same(routers, unmoved)
    assert changed.epochs[-1].validation_loss != report.epochs[-1].validation_loss


class Cut(Exception):
    pass


class Tracker:
    """Stops a fit after an epoch."""

    def __init__(self, last=None):
        self.last, self.told = last, []

    def log(self, values, step):
        self.told.append((step, values))
        if step == self.last:
            raise Cut


@pytest.mark.parametrize("robust", ["none", "cvar"])
def test_goes_on_where_it_was_cut(tmp_path, robust):
    config, groups = change(CONFIG, robust=robust), [f"g{i % 5}" for i in range(60)]
    whole, report = run(config, groups=groups)
    routers = new_routers()
    for last in (1, 3):
        with pytest.raises(Cut):
            run(config, routers=routers, groups=groups, folder=tmp_path, tracker=Tracker(last))
        assert same(routers, new_routers())  # untouched so far
    tracker = Tracker()
    resumed, again = run(config, routers=routers, groups=groups, folder=tmp_path, tracker=tracker)
    assert same(resumed, whole) and timeless(again) == timeless(report)
    assert [step for step, _ in tracker.told] == [4]
    assert tracker.told[0][1]["validation/loss"] == report.epochs[-1].validation_loss
    finished, _ = run(config, groups=groups, folder=tmp_path)  # nothing is left to do
    assert same(finished, whole)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import test_training_fit as t
module = sys.modules["drllm_fast.training.fit"]
steps, original = [0], module.focal_loss
def focal_loss(*arguments):
    steps[0] += 1
    if steps[0] == 20:  # in the third epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
module.focal_loss = focal_loss
t.run(folder=sys.argv[1])
"""


def test_goes_on_after_a_kill(tmp_path):
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    killed = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    tracker = Tracker()
    resumed, _ = run(folder=tmp_path, tracker=tracker)
    assert [step for step, _ in tracker.told] == [3, 4]
    assert same(resumed, run()[0])


def test_a_folder_of_another_fit_is_refused(tmp_path):
    windows, targets = data()
    run(folder=tmp_path)
    kept = (tmp_path / FILE).read_bytes()
    others = targets.clone()
    others[0, 0] = (others[0, 0] + 1) % 3
    for options, message in (
        ({"config": change(CONFIG, epochs=5)}, "config.epochs is 4, not 5"),
        ({"given": (windows, others)}, "data is"),
        ({"given": (WindowSet(windows.pooled + 1e-3, windows.counts), targets)}, "data is"),
        ({"groups": ["a"] * 60}, "data is"),
        ({"routers": new_routers(1)}, "first weights"),
        ({"objective": by_class}, "objective is None, not .*by_class"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options, folder=tmp_path)
    assert (tmp_path / FILE).read_bytes() == kept
    (tmp_path / FILE).write_bytes(kept[:-10])
    with pytest.raises(OSError, match="damaged"):
        run(folder=tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        run(folder=tmp_path / FILE)


def by_class(logits, targets):
    return torch.nn.functional.cross_entropy(logits.permute(1, 2, 0), targets, reduction="none").mean(1)


def test_an_objective_of_the_callers():
    """Its targets may be anything; the built-in cross-entropy is one objective among others."""
    config = change(CONFIG, gamma=0.0, balance="none")
    built_in, expected = run(config)
    routers, report = run(config, objective=by_class)
    for ours, theirs in zip(routers.parameters(), built_in.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert report.epochs[-1].validation_loss == pytest.approx(expected.epochs[-1].validation_loss, rel=1e-3)
    assert report.epochs[-1].metrics is None and report.class_counts is None

    windows, _ = data()
    wanted = torch.randn(60, 2, 5, generator=torch.Generator().manual_seed(1))
    shapes = set()

    def objective(logits, targets):
        assert logits.shape == (LAYERS, len(targets), 3) and logits.dtype == torch.float32
        shapes.add(tuple(targets.shape))
        return (logits.mean(0).sum(1) - targets.sum((1, 2))).square()

    _, report = run(given=(windows, wanted), objective=objective)
    assert shapes == {(8, 2, 5), (6, 2, 5)}  # 54 = 6 * 8 + 6 to train on, 6 held out
    assert report.epochs[-1].train_loss < report.epochs[0].train_loss
    assert "-" in report.text()
    with pytest.raises(ValueError, match=r"losses \[8\], got \[3, 8\]"):
        run(given=(windows, wanted), objective=lambda logits, targets: logits.sum(-1))


def test_logit_adjustment_takes_part():
    plain, adjusted = run()[1], run(change(CONFIG, logit_adjustment=1.0))[1]
    assert plain.epochs[0].train_loss != adjusted.epochs[0].train_loss


def test_cvar_is_the_mean_of_the_worst():
    losses = np.array([1.0, 5.0, 3.0, 4.0, 2.0])
    for share, expected in ((0.2, 5), (0.4, 4.5), (0.3, (5 + 0.5 * 4) / 1.5), (1.0, 3), (0.01, 5)):
        assert cvar(losses, share) == pytest.approx(expected)
        # Rockafellar and Uryasev's other form: least over t of  t + mean of (l - t)+ / share.
        if share >= 0.2:
            assert min(t + np.maximum(losses - t, 0).mean() / share for t in losses) == pytest.approx(expected)
    assert worst(losses, 0.3) == pytest.approx([0, 2 / 3, 0, 1 / 3, 0])


def test_draws():
    rng = np.random.default_rng(0)
    assert sorted(draw(rng, np.full(7, 1 / 7))) == list(range(7))
    part = Part.of(np.arange(10), ["a"] * 8 + ["b"] * 2)
    probabilities = oversampled(part, np.array([1.0, 2.0]), 0.5)
    assert probabilities == pytest.approx([0.05] * 8 + [0.3] * 2)
    times = np.zeros(10)
    for _ in range(400):
        drawn = np.bincount(draw(rng, probabilities), minlength=10)
        assert drawn.sum() == 10 and (drawn[8:] == 3).all() and (drawn[:8] <= 1).all()
        times += drawn
    assert times[:8] / 400 == pytest.approx([0.5] * 8, abs=0.12)


def test_a_group_that_is_not_drawn_keeps_its_loss():
    part = Part.of(np.array([9, 8, 7, 6]), ["x"] * 6 + ["b", "b", "a", "a"])
    assert part.names == ["a", "b"]
    assert part.means(np.array([0, 1, 1]), np.array([1.0, 3.0, 5.0]), np.array([5.0, 7.0])) == pytest.approx([3, 7])


def hard_group():
    """A large group and a small one that contradicts it, but for a faint mark."""
    g = torch.Generator().manual_seed(0)
    prompts, rare = 200, 16
    targets = torch.randint(0, 3, (prompts, LAYERS), generator=g)
    pooled = 0.1 * torch.randn(LAYERS, prompts, WINDOWS, WIDTH, generator=g)
    shown = targets.clone()
    shown[:rare] = (shown[:rare] + 1) % 3
    pooled[..., :3] += torch.nn.functional.one_hot(shown.T, 3).unsqueeze(2)
    pooled[:, :rare, :, 3] += 0.5
    return (WindowSet(pooled, torch.full((prompts,), WINDOWS)), targets), ["rare"] * rare + ["common"] * (
        prompts - rare
    )


def test_cvar_training_lifts_the_worst_group():
    given, groups = hard_group()
    config = FitConfig(epochs=6, learning_rate=1e-2, validation=0.0, cvar=0.5)
    plain = run(config, given, groups=groups)[1].epochs[-1]
    robust = run(change(config, robust="cvar"), given, groups=groups)[1].epochs[-1]
    assert plain.train_cvar == plain.group_losses["rare"] > 2 * plain.group_losses["common"]
    assert robust.group_losses["rare"] < 0.6 * plain.group_losses["rare"]
    assert robust.train_cvar == max(robust.group_losses.values())
    for epoch in (plain, robust):
        mean = 0.08 * epoch.group_losses["rare"] + 0.92 * epoch.group_losses["common"]
        assert epoch.train_loss == pytest.approx(mean)


def test_a_step_is_three_matrix_products_for_the_first_layer():
    windows, targets = data(16)
    config = FitConfig(epochs=1, batch_size=16, validation=0.0)
    with FlopCounterMode(display=False) as counter:
        run(config, (windows, targets))
    first = 2 * LAYERS * 16 * WINDOWS * WIDTH * 16  # [L, B * windows, d] @ [d, h]
    second = 2 * LAYERS * 16 * 16 * 3
    assert counter.get_total_flops() == 2 * first + 3 * second  # no gradient of the windows


def test_report():
    _, report = run(change(CONFIG, epochs=30))
    assert json.loads(json.dumps(report.to_dict()))["epochs"][0]["number"] == 1
    lines = report.text().splitlines()
    rows = [line for line in lines[2:] if line.split() and line.split()[0].isdigit() and "prompts" not in line]
    numbers = [int(line.split()[0]) for line in rows]
    assert numbers[0] == 1 and numbers[-1] == 30 and len(numbers) == 12
    last = report.epochs[-1]
    assert f"{last.validation_loss:.4f}" in rows[-1] and f"{last.metrics['classes']['repeat']['f1']:.3f}" in rows[-1]
    assert "54 prompts to train on, 6 held out" in lines[-1]
    assert report.warmup_steps == 5 and report.config["epochs"] == 30
    assert 0 < last.learning_rate < 0.01 * CONFIG.learning_rate


def spoil(name, value, place):
    windows, targets = data()
    tensor = targets if name == "targets" else getattr(windows, name)
    tensor[place] = value
    return windows, targets


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (spoil("pooled", torch.nan, (1, 5, 0, 2)), "layer 1, prompt 5"),
        (spoil("pooled", torch.inf, (2, 7, 0, 0)), "layer 2, prompt 7"),
        (spoil("pooled", -torch.inf, (0, 59, 0, 0)), "layer 0, prompt 59"),
        (spoil("counts", 0, 4), r"prompts \[4\] use \[0\]"),
        (spoil("counts", WINDOWS + 1, 4), r"prompts \[4\] use \[5\]"),
        (spoil("targets", 3, (4, 1)), r"\[4, 1\] is 3"),
        (spoil("targets", -1, (4, 1)), r"\[4, 1\] is -1"),
        (spoil("targets", 1, data()[1] == 0), 'skip .*balance="none"'),
    ],
)
def test_bad_values_are_refused_before_anything_changes(given, message, tmp_path):
    routers, folder = new_routers(), tmp_path / "fit"
    with pytest.raises(ValueError, match=message):
        run(given=given, routers=routers, folder=folder)
    assert same(routers, new_routers()) and not folder.exists()


def test_an_empty_class_is_fine_where_nothing_is_balanced():
    given = spoil("targets", 1, data()[1] == 0)
    _, report = run(change(CONFIG, balance="none", logit_adjustment=1.0), given)
    assert report.class_counts[0] == 0 and report.class_weights == [1, 1, 1]


def test_shapes_and_types_that_do_not_belong_together():
    windows, targets = data()
    pooled, counts = windows.pooled, windows.counts
    for given, message in (
        ((WindowSet(pooled[:2], counts), targets), "make windows and routers of one model"),
        ((WindowSet(pooled[..., :5], counts), targets), "make windows and routers"),
        ((WindowSet(pooled[:, :, :2], counts), targets), "make windows and routers"),
        ((WindowSet(pooled, counts[:-1]), targets), "make windows and routers"),
        ((windows, targets[:-1]), r"\[60, 3\]"),
        ((windows, targets.float()), r"\[60, 3, 3\]"),
        ((windows, targets[:, :2]), r"\[60, 3\]"),
        ((WindowSet(pooled[:, :0], counts[:0]), targets[:0]), "0 prompts are too few"),
        ((WindowSet(pooled[:, :1], counts[:1]), targets[:1]), "1 prompts are too few"),
    ):
        with pytest.raises(ValueError, match=message):
            run(given=given)
    with pytest.raises(ValueError, match="leaves none"):
        run(change(CONFIG, validation=0.9), (WindowSet(pooled[:, :2], counts[:2]), targets[:2]))
    with pytest.raises(TypeError, match="floating and counts integer"):
        run(given=(WindowSet(pooled.int(), counts), targets))
    with pytest.raises(TypeError, match="float32"):
        run(routers=new_routers().half())
    for groups in (["a"] * 59, "a" * 60 + "b", [1] * 60):
        with pytest.raises(ValueError, match="groups must be one name"):
            run(groups=groups)
    with pytest.raises(ValueError, match="needs groups"):
        run(change(CONFIG, robust="cvar"))
    with pytest.raises(ValueError, match=r"targets must be \[60, ...\]"):
        run(given=(windows, torch.zeros(())), objective=by_class)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0}, {"epochs": 1.5}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")},
        {"weight_decay": -1.0}, {"warmup_steps": -1}, {"schedule": "linear"}, {"gamma": -0.5}, {"beta": 1.0},
        {"balance": "inverse"}, {"logit_adjustment": -1.0}, {"robust": "dro"}, {"cvar": 0.0}, {"cvar": 1.1},
        {"validation": 1.0}, {"validation": -0.1}, {"seed": -1},
    ],
)  # fmt: skip
def test_settings_out_of_range(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        FitConfig(**changes)


def test_a_loss_that_overflows_is_an_error_and_changes_nothing(tmp_path):
    routers = new_routers()
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        run(change(CONFIG, learning_rate=1e30), routers=routers, folder=tmp_path)
    assert same(routers, new_routers())
