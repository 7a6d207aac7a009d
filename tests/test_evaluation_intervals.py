"""Bootstrap intervals and paired tests, against SciPy, by hand, and by simulation."""

import math

import numpy as np
import pytest

from drllm_fast.evaluation.intervals import mcnemar, mean_interval, paired_difference, resampled_means


def random(seed=0):
    return np.random.default_rng(seed)


def test_intervals_cover_in_95_of_100_cases():
    rng = random(1)
    for n, truth, draw in ((60, 0.7, lambda n: rng.random(n) < 0.7), (80, 2.0, lambda n: rng.gamma(4, 0.5, n))):
        hits = 0
        for case in range(600):
            found = mean_interval(draw(n).astype(float), samples=400, seed=case)
            hits += found.low <= truth <= found.high
        assert 0.915 < hits / 600 < 0.97  # 0.95, less what a percentile interval of so few values lacks


def test_paired_intervals_cover_and_use_the_pairing():
    rng, hits, wins = random(2), 0, 0
    for case in range(400):
        hard = rng.normal(0, 3, 60)  # items differ much more than contenders
        a, b = hard + rng.normal(0.2, 0.5, 60), hard + rng.normal(0, 0.5, 60)
        found = paired_difference(a, b, samples=400, seed=case)
        hits += found.low <= 0.2 <= found.high
        wins += found.high - found.low < 0.5
    assert 0.91 < hits / 400 < 0.975 and wins == 400


def test_a_difference_of_nothing_is_seldom_significant():
    rng = random(3)
    small = sum(
        paired_difference(rng.normal(size=60), rng.normal(size=60), samples=400, seed=case).p < 0.05
        for case in range(600)
    )
    assert 0.025 < small / 600 < 0.085


def test_the_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    values = random(4).gamma(2, 1, 150)
    own = mean_interval(values, samples=20000)
    other = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=random(5))
    spread = other.standard_error
    assert own.mean == values.mean()
    assert abs(own.low - other.confidence_interval.low) < 0.06 * spread
    assert abs(own.high - other.confidence_interval.high) < 0.06 * spread


def test_the_interval_of_two_values_by_hand():
    # The mean of two draws from {0, 1} is 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    means = resampled_means([0, 1], samples=40000)
    shares = [(means == value).mean() for value in (0, 0.5, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_weights_draw_numerator_and_denominator():
    values, weights = np.array([1.0, 4.0]), np.array([3.0, 1.0])
    means = resampled_means(values, weights=weights, samples=40000)
    shares = [(np.isclose(means, value)).mean() for value in (1, 7 / 4, 4)]  # (3 * 1 + 1 * 4) / 4
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    assert mean_interval(values, weights=weights).mean == 7 / 4
    stats = pytest.importorskip("scipy.stats")
    rng = random(6)
    values, weights = rng.gamma(2, 1, 100), rng.integers(1, 40, 100)
    own = mean_interval(values, weights=weights, samples=20000)

    def mean(x, w, axis):
        return (x * w).sum(axis) / w.sum(axis)

    other = stats.bootstrap(
        (values, weights), mean, paired=True, vectorized=True, method="percentile", n_resamples=20000, rng=random(7)
    )
    assert abs(own.low - other.confidence_interval.low) < 0.06 * other.standard_error
    assert abs(own.high - other.confidence_interval.high) < 0.06 * other.standard_error


def test_columns_share_their_draws_and_chunks_change_nothing(monkeypatch):
    values = random(8).normal(size=(30, 3))
    whole = resampled_means(values, samples=100, seed=9)
    for column in range(3):
        assert np.allclose(resampled_means(values[:, column], samples=100, seed=9), whole[:, column])
    monkeypatch.setattr("drllm_fast.evaluation.intervals.CHUNK", 70)
    parts = resampled_means(values, samples=100, seed=9)
    assert np.allclose(parts.mean(axis=0), values.mean(axis=0), atol=0.1) and np.allclose(parts, whole)
    assert not np.allclose(resampled_means(values, samples=100, seed=10), whole)


def test_p_by_hand():
    assert paired_difference([1, 1, 0], [1, 1, 0]).p == 1
    better = paired_difference(np.ones(20), np.zeros(20), samples=99)
    assert (better.mean, better.low, better.high, better.p) == (1, 1, 1, 2 / 100)
    assert paired_difference(np.zeros(20), np.ones(20), samples=99).p == 2 / 100
    a = random(11).normal(0.3, 1, 50)
    forth, back = paired_difference(a, np.zeros(50)), paired_difference(np.zeros(50), a)
    assert forth.p == back.p and forth.low == pytest.approx(-back.high) and 0 < forth.p < 1


@pytest.mark.parametrize("won, lost, p", [(0, 0, 1), (1, 0, 1), (5, 0, 1 / 16), (3, 3, 1), (8, 2, 112 / 1024)])
def test_mcnemar_by_hand(won, lost, p):
    a = [1] * won + [0] * lost + [1, 1, 0]
    b = [0] * won + [1] * lost + [1, 1, 0]
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(p)


def test_mcnemar_is_the_exact_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    rng = random(12)
    for n in (7, 40, 3000):
        a, b = rng.random(n) < 0.6, rng.random(n) < 0.55
        won, lost = int((a & ~b).sum()), int((b & ~a).sum())
        assert mcnemar(a, b) == pytest.approx(stats.binomtest(won, won + lost).pvalue)
        assert math.isfinite(mcnemar(a, b))


def test_refusals():
    with pytest.raises(ValueError, match="no values"):
        resampled_means([])
    with pytest.raises(ValueError, match="positive"):
        resampled_means([1, 2], weights=[1, 0])
    with pytest.raises(ValueError, match="positive"):
        resampled_means([1, 2], weights=[1])
    for test in (mcnemar, paired_difference):
        with pytest.raises(ValueError, match="a pair needs two"):
            test([1, 0], [1])
