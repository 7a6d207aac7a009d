"""Losses against their published formulae in plain Python, and the figures of a fit against scikit-learn or by hand."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from drllm_fast.training.loss import adjust, class_counts, effective_number_weights, focal_loss
from drllm_fast.training.metrics import measure, reliability
from drllm_fast.training.trackers import make_tracker

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.5]
WEIGHTS = [0.75, 0.27, 1.98]


def formula(logits, target, weights, gamma):
    """Lin et al. 2017, eq. 5, for one element: target is the probabilities of the three classes."""
    exponentials = [math.exp(x - max(logits)) for x in logits]
    loss = 0.0
    for c in range(3):
        q = exponentials[c] / sum(exponentials)
        rest = sum(e for i, e in enumerate(exponentials) if i != c) / sum(exponentials)
        loss += target[c] * weights[c] * rest**gamma * -math.log(q)
    return loss


def slopes(logits, target, weights, gamma, step=1e-6):
    found = []
    for c in range(3):
        up, down = ([x + sign * step * (i == c) for i, x in enumerate(logits)] for sign in (1, -1))
        found.append((formula(up, target, weights, gamma) - formula(down, target, weights, gamma)) / (2 * step))
    return found


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("soft", [False, True])
def test_focal_loss_and_its_gradient_are_the_formula(gamma, soft):
    g = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(4, 5, 3, generator=g, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, 3, (4, 5), generator=g)
    shares = torch.nn.functional.one_hot(targets, 3).double()
    if soft:
        targets = shares = torch.rand(4, 5, 3, generator=g, dtype=torch.float64).softmax(-1)
    loss = focal_loss(logits, targets, torch.tensor(WEIGHTS, dtype=torch.float64), gamma)
    assert loss.shape == (4, 5)
    loss.sum().backward()
    for i in range(4):
        for j in range(5):
            case = logits[i, j].tolist(), shares[i, j].tolist(), WEIGHTS, gamma
            assert loss[i, j].item() == pytest.approx(formula(*case), rel=1e-10)
            assert logits.grad[i, j].tolist() == pytest.approx(slopes(*case), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_one_hot_targets_are_classes(gamma):
    g = torch.Generator().manual_seed(2)
    logits, classes = torch.randn(50, 3, generator=g), torch.randint(0, 3, (50,), generator=g)
    one_hot = torch.nn.functional.one_hot(classes, 3).float()
    weights = torch.tensor(WEIGHTS)
    assert torch.equal(focal_loss(logits, classes, weights, gamma), focal_loss(logits, one_hot, weights, gamma))
    if not gamma:
        cross_entropy = torch.nn.functional.cross_entropy(logits, classes, weights, reduction="none")
        torch.testing.assert_close(focal_loss(logits, classes, weights, gamma), cross_entropy)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("scale", [20.0, 200.0, 1e4, 1e30])
def test_sure_predictions_have_finite_gradients(gamma, scale):
    logits = torch.tensor([[1.0, 0, -1], [1, 1, -1], [-1, 0, 1]]).mul(scale).requires_grad_()
    for targets in (torch.tensor([0, 0, 0]), torch.full((3, 3), 1 / 3)):
        logits.grad = None
        loss = focal_loss(logits, targets, torch.ones(3), gamma)
        loss.sum().backward()
        assert loss.isfinite().all() and logits.grad.isfinite().all()
    # A sure mistake is punished in full: -log q is the gap, and 1 - q is 1.
    wrong = focal_loss(logits.detach(), torch.tensor([0, 0, 0]), torch.ones(3), gamma)[2].item()
    assert wrong == pytest.approx(2 * scale, rel=1e-6)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([[0, 1], [1, 3]]), r"\[1, 1\] is 3"),
        (torch.tensor([[0, -1], [1, 3]]), r"\[0, 1\] is -1"),
        (torch.tensor([[[0.5, 0.5, 0.0]] * 2, [[0.5, 0.5, 0.5]] * 2]), r"\[1, 0\] is \[0.5, 0.5, 0.5\]"),
        (torch.tensor([[[0.5, 0.5, 0.0]] * 2, [[-0.5, 1.5, 0.0]] * 2]), r"\[1, 0\] is"),
        (torch.full((2, 2, 3), torch.nan), r"\[0, 0\] is \[nan"),
    ],
)
def test_wrong_targets_are_named(targets, message):
    with pytest.raises(ValueError, match=message):
        focal_loss(torch.zeros(2, 2, 3), targets, torch.ones(3), 2.0)


def test_other_bad_arguments_of_the_loss():
    logits, targets = torch.zeros(2, 3), torch.tensor([0, 1])
    for arguments in ((logits[:, :2], targets), (logits, targets[:1]), (logits, torch.zeros(2, 2))):
        with pytest.raises(ValueError, match="must be"):
            focal_loss(*arguments, torch.ones(3), 2.0)
    with pytest.raises(ValueError, match="gamma"):
        focal_loss(logits, targets, torch.ones(3), -1.0)
    with pytest.raises(TypeError, match="bool"):
        focal_loss(logits, targets.bool(), torch.ones(3), 2.0)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999, None])
def test_weights_are_those_of_effective_numbers(beta):
    counts = [4500, 106_000, 1474]
    used = 1 - 1 / sum(counts) if beta is None else beta
    raw = [(1 - used) / (1 - used**n) for n in counts]
    expected = [w / (sum(raw) / 3) for w in raw]
    weights = effective_number_weights(torch.tensor(counts), beta)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_published_beta_hardly_weighs_and_the_default_does():
    counts = torch.tensor([4500, 106_000, 1474])
    published, default = (effective_number_weights(counts, beta) for beta in (0.999, None))
    assert published.max() / published.min() < 1.5
    assert default.max() / default.min() > 20
    torch.testing.assert_close(effective_number_weights(counts * 50), default)  # shares alone matter


@pytest.mark.parametrize("beta", [1.0, -0.1, math.nan])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match="beta"):
        effective_number_weights(torch.tensor([1, 2, 3]), beta)


def test_an_empty_class_has_no_weight():
    with pytest.raises(ValueError, match='repeat.*balance="none"'):
        effective_number_weights(torch.tensor([3, 2, 0]))


def test_counts_of_classes_and_of_probabilities():
    classes = torch.tensor([[0, 1, 1], [2, 1, 1]])
    assert class_counts(classes).tolist() == [1, 4, 1]
    assert class_counts(torch.nn.functional.one_hot(classes, 3).float()).tolist() == [1, 4, 1]
    assert class_counts(torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]])).tolist() == [0.75, 1.0, 0.25]


def test_logit_adjustment_adds_the_log_of_the_prior():
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    for counts in ([7, 90, 0], [[7, 90, 0], [0, 0, 0]]):
        adjusted = adjust(logits, torch.tensor(counts).unsqueeze(-2), 0.5)
        rows = counts if isinstance(counts[0], list) else [counts] * 2
        for layer, row in enumerate(rows):
            shift = [0.5 * math.log((n + 1) / (sum(row) + 3)) for n in row]
            torch.testing.assert_close(adjusted[layer] - logits[layer], torch.tensor(shift).expand(4, 3))
    assert adjusted.dtype == torch.float32


def figures_case(n=60, layers=4):
    g = torch.Generator().manual_seed(5)
    targets = torch.randint(0, 3, (n, layers), generator=g)
    logits = torch.randn(n, layers, 3, generator=g) + torch.nn.functional.one_hot(targets, 3)
    return logits.transpose(0, 1), targets


def test_figures_are_those_of_scikit_learn():
    scores = pytest.importorskip("sklearn.metrics")
    logits, targets = figures_case()
    metrics = measure(logits, targets)
    labels, chosen = targets.flatten(), logits.transpose(0, 1).argmax(-1).flatten()
    precision, recall, f1, support = scores.precision_recall_fscore_support(labels, chosen, labels=[0, 1, 2])
    for c, name in enumerate(("skip", "execute", "repeat")):
        ours = metrics.classes[name]
        assert (ours.precision, ours.recall, ours.f1) == pytest.approx((precision[c], recall[c], f1[c]))
        assert ours.labels == support[c] and ours.chosen == (chosen == c).sum()
    assert metrics.accuracy == pytest.approx(scores.accuracy_score(labels, chosen))
    assert metrics.macro_f1 == pytest.approx(scores.f1_score(labels, chosen, average="macro"))
    assert metrics.visits == pytest.approx(chosen.sum().item() / 60)
    assert metrics.label_visits == pytest.approx(labels.sum().item() / 60)


def test_calibration_is_counted_bin_by_bin():
    logits, targets = figures_case()
    metrics = measure(logits, targets)
    errors = []
    for c, name in enumerate(("skip", "execute", "repeat")):
        bins = {}
        for prompt in range(60):
            for layer in range(4):
                q = logits[layer, prompt].double().softmax(-1)[c].item()
                bins.setdefault(int(q * 10), []).append((q, targets[prompt, layer].item() == c))
        expected = [
            (len(b), sum(q for q, _ in b) / len(b), sum(hit for _, hit in b) / len(b)) for _, b in sorted(bins.items())
        ]
        found = metrics.classes[name].bins
        assert [b.count for b in found] == [n for n, _, _ in expected]
        for b, (_, q, hits) in zip(found, expected, strict=True):
            assert (b.predicted, b.observed) == pytest.approx((q, hits))
        errors.append(sum(n * abs(q - hits) for n, q, hits in expected) / 240)
        assert metrics.classes[name].ece == pytest.approx(errors[-1])
    assert metrics.ece == pytest.approx(sum(errors) / 3)


def test_figures_by_hand():
    #         skip chosen        execute chosen      a tie executes
    logits = torch.tensor([[[9.0, 0, 0], [0, 9.0, 0], [1.0, 0, 1.0]]])  # [1, 3, 3]
    metrics = measure(logits, torch.tensor([[0], [0], [1]]))
    skip, execute, repeat = (metrics.classes[name] for name in ("skip", "execute", "repeat"))
    assert (skip.precision, skip.recall, skip.f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert (execute.precision, execute.recall, execute.f1) == (0.5, 1.0, pytest.approx(2 / 3))
    assert (repeat.precision, repeat.recall, repeat.f1) == (None, None, None)  # of nothing
    assert metrics.macro_f1 == pytest.approx(2 / 3)
    assert (metrics.visits, metrics.label_visits) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_figures_of_soft_targets():
    logits = torch.tensor([[[0.0, 1, 0], [2.0, 0, 0]]])
    shares = torch.tensor([[[0.2, 0.5, 0.3]], [[0.6, 0.0, 0.4]]])
    metrics = measure(logits, shares)
    assert metrics.accuracy == 1
    assert metrics.label_visits == pytest.approx((0.5 + 0.6 + 0.8) / 2)
    # Calibration is against the probabilities, 0.3 and 0.4, though repeat is no prompt's label.
    q = [1 / (2 + math.e), 1 / (2 + math.e**2)]
    assert metrics.classes["repeat"].ece == pytest.approx((abs(q[0] - 0.3) + abs(q[1] - 0.4)) / 2)
    ece, _ = reliability(torch.tensor([0.25, 0.25, 1.0], dtype=torch.float64), torch.tensor([0.5, 0.0, 0.7]).double())
    assert ece == pytest.approx(0.1)


def test_trackers(tmp_path, monkeypatch, capsys):
    with make_tracker("none") as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert capsys.readouterr() == ("", "")
    make_tracker("console").log({"train/loss": 0.25}, 3)
    assert "3: train/loss 0.25" in capsys.readouterr().err
    with pytest.raises(ValueError, match="wandb"):
        make_tracker("wandb")
    for missing in ("tensorboard", "trackio"):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ImportError, match=f"pip install {missing}"):
            make_tracker(missing, tmp_path)
    make_tracker("auto", tmp_path).log({"loss": 0.5}, 1)  # neither is there: the console
    assert "loss 0.5" in capsys.readouterr().err


def test_trackio_is_given_a_run_and_its_figures(tmp_path, monkeypatch):
    told = []
    fake = SimpleNamespace(
        __spec__=object(),
        init=lambda **options: told.append(options),
        log=lambda values, step: told.append((values, step)),
        finish=lambda: told.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with make_tracker("auto", tmp_path / "run7") as tracker:
        tracker.log({"loss": 0.5}, 2)
    assert told == [{"project": "drllm-fast", "name": "run7", "resume": "allow"}, ({"loss": 0.5}, 2), "finish"]
    with pytest.raises(ValueError, match="needs a folder"):
        make_tracker("trackio")


def test_tensorboard_writes_into_the_folder(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with make_tracker("tensorboard", tmp_path) as tracker:
        tracker.log({"train/loss": 0.5}, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 0.5)]
