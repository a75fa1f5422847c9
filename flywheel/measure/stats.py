"""Estimates with bootstrap intervals, over questions or over runs and questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Estimate = tuple[float, float, float]  # estimate, low and high end of its interval


def bootstrap_mean(values: Sequence[float], n: int = 2000, seed: int = 0) -> Estimate:
    """(mean, low, high): the mean over questions and its 95% percentile-bootstrap interval from `n` resamples.

    `values`: one number per question. Constant data (or a single question) gives (c, c, c). Raises ValueError if
    there are no values or one is not finite.
    """
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or not len(data) or not np.isfinite(data).all():
        raise ValueError(f"bootstrap_mean: a non-empty list of finite numbers wanted, got shape {data.shape}")
    if data.min() == data.max():
        return float(data[0]), float(data[0]), float(data[0])
    # percentile, not BCa: the mean needs no bias correction, and BCa's jackknife is undefined on nearly constant
    # data, such as a bin that is almost completely solved or unsolved
    interval = bootstrap(
        (data,), np.mean, n_resamples=n, batch=100, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(data.mean()), float(interval.low), float(interval.high)


def bootstrap_runs(values: Sequence[Sequence[float]], n: int = 2000, seed: int = 0) -> Estimate:
    """(mean, low, high) of a (runs, questions) array: the mean of the runs' means, resampling runs and questions.

    Each resample uses the same questions for all runs; NaN where a run lacks a question. With few runs the interval is
    too narrow: resampling three runs shows about two thirds of the variance between runs. Raises ValueError if a run
    has no number or an infinite one.
    """
    data = np.asarray(values, dtype=float)
    there = ~np.isnan(data)
    if data.ndim != 2 or not there.any(axis=1).all() or np.isinf(data).any():
        raise ValueError(f"bootstrap_runs: runs x questions wanted, each run with a number, got shape {data.shape}")
    runs, questions = data.shape
    rng, filled = np.random.default_rng(seed), np.where(there, data, 0.0)
    drawn = rng.multinomial(questions, np.full(questions, 1 / questions), size=n)
    counts = drawn @ there.T  # n x runs; 0 where a run has none of the questions drawn
    means = drawn @ filled.T / np.where(counts, counts, 1)
    weights = rng.multinomial(runs, np.full(runs, 1 / runs), size=n) * (counts > 0)
    total = weights.sum(axis=1)
    means = ((weights * means).sum(axis=1) / np.where(total, total, 1))[total > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return float((filled.sum(axis=1) / there.sum(axis=1)).mean()), float(low), float(high)


def paired_gain(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Estimate:
    """(gain, low, high) of after - before, for the same questions in the same order (paired bootstrap).

    Raises ValueError if the numbers of questions differ, and as `bootstrap_mean` does.
    """
    if len(before) != len(after):
        raise ValueError(f"paired_gain: {len(before)} questions before, {len(after)} after; the same ones wanted")
    return bootstrap_mean(np.asarray(after, dtype=float) - np.asarray(before, dtype=float), seed=seed)
