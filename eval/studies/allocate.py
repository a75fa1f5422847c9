"""Does it pay to give each question its own number of samples?

Two ways to spend N samples a question on average, against best-of-N weighted, which gives N to each. All three draw
from the pool of `python -m eval study` (`--pool` judged samples a question) and select by the PRM-weighted vote:

- adaptive: each question alone is sampled until its vote is decided (`search/adaptive.py`), with the best `sure` of
  those that need no more than N samples on average (with the lowest if none does: four samples are its least);
- elimination: all questions share one budget; in each turn every question that is left gets one more sample, and those
  with a sample that the PRM scores at or above a threshold are done. After Zuo and Zhu 2025, arXiv 2506.12721.

`sure` and the threshold are chosen on one half of the questions and used on the other, both ways round. Every figure is
the mean of `--orders` orders of the pool, with a 95% interval over questions; `samples` is what was really spent.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from eval.curves import SELECT, is_right
from eval.draws import Drawn, add_sizes, check_sizes, read_part
from flywheel.measure.stats import bootstrap_mean, paired_gain
from flywheel.search.adaptive import Adaptive, certainty, votes
from flywheel.stages.shared import by_question

SURE = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # of the PRM's scores: thresholds of elimination
Pools = Mapping[str, Sequence[Drawn]]
Rule = Callable[[Pools, int, float], dict[str, int]]  # pools, samples a question, setting -> samples of each question


def adaptive(pools: Pools, mean: int, sure: float) -> dict[str, int]:
    """Samples until the vote of each question is decided; at most its pool."""
    out = {}
    for question, pool in pools.items():
        reached = (count for count, found in certainties(tuple((s.answer, s.score) for s in pool)) if found >= sure)
        out[question] = next(reached, len(pool))
    return out


@lru_cache(maxsize=1024)  # for each `sure`, on the same pools
def certainties(drawn: tuple[tuple[str | None, float], ...]) -> list[tuple[int, float]]:
    """(samples, certainty of their vote) at each step of adaptive sampling, from (answer, PRM score) of each sample."""
    candidates = [SimpleNamespace(score=score, solution=SimpleNamespace(answer=answer)) for answer, score in drawn]
    counts = range(Adaptive.step, len(drawn), Adaptive.step)
    return [(count, certainty(votes(candidates[:count]))) for count in counts]


def eliminate(pools: Pools, mean: int, threshold: float) -> dict[str, int]:
    """Samples of each question when all share `mean` a question and those with a score of `threshold` are done."""
    counts, left = dict.fromkeys(pools, 0), mean * len(pools)
    active = list(pools)
    while active and left:
        for question in active[:left]:
            counts[question] += 1
        left -= min(left, len(active))
        active = [q for q in active if counts[q] < len(pools[q]) and pools[q][counts[q] - 1].score < threshold]
    return counts


def rights(pools: Pools, counts: Mapping[str, int]) -> dict[str, bool]:
    return {q: is_right(pool[: counts[q]], SELECT["weighted"]) for q, pool in pools.items()}


def best_setting(rule: Rule, pools: Pools, mean: int, settings: Sequence[float]) -> float:
    """The setting with most right answers among those that need at most `mean` samples a question on average."""
    right = {}
    for setting in settings:
        counts = rule(pools, mean, setting)
        if sum(counts.values()) <= mean * len(pools):
            right[setting] = sum(rights(pools, counts).values())
    return max(right, key=lambda setting: (right[setting], setting), default=min(settings))


def halves(questions: Sequence[str], rng: random.Random) -> list[list[str]]:
    shuffled = rng.sample(questions, len(questions))
    return [shuffled[::2], shuffled[1::2]]


def compare(pools: Pools, mean: int, orders: int, rng: random.Random) -> dict[str, dict[str, np.ndarray]]:
    """Method -> {right, samples}: an array over the questions of `pools`, means over `orders` orders of the pools."""
    scores = [s.score for pool in pools.values() for s in pool]
    ways: dict[str, tuple[Rule, Sequence[float]]] = {
        "adaptive": (adaptive, SURE),
        "elimination": (eliminate, sorted({float(np.quantile(scores, q)) for q in QUANTILES})),
    }
    names = list(pools)
    sums = {way: {"right": np.zeros(len(names)), "samples": np.zeros(len(names))} for way in ("best_of_n", *ways)}
    for _ in range(orders):
        shuffled = {q: rng.sample(list(pool), len(pool)) for q, pool in pools.items()}
        spent = {"best_of_n": dict.fromkeys(names, mean), **{way: {} for way in ways}}
        one, other = ({q: shuffled[q] for q in half} for half in halves(names, rng))
        for way, (rule, settings) in ways.items():
            for fit, use in ((one, other), (other, one)):
                spent[way] |= rule(use, mean, best_setting(rule, fit, mean, settings))
        for way, counts in spent.items():
            right = rights(shuffled, counts)
            sums[way]["right"] += [right[q] / orders for q in names]
            sums[way]["samples"] += [counts[q] / orders for q in names]
    return sums


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser)
    parser.add_argument("--orders", type=int, default=20, help="orders of the pool (%(default)s)")


def measure(args: argparse.Namespace) -> dict:
    check_sizes(args)
    out = {}
    for run in args.runs:
        pools, rows = by_question(read_part(run, args, "pool", Drawn)), []
        for mean in args.budgets:
            found = compare(pools, mean, args.orders, random.Random(mean))
            base = found["best_of_n"]["right"].tolist()
            for way, sums in found.items():
                right = sums["right"].tolist()
                row = {"samples_a_question": mean, "way": way, "right": bootstrap_mean(right)}
                rows.append(
                    {**row, "less_best_of_n": paired_gain(base, right), "samples": float(sums["samples"].mean())}
                )
        out[str(run.root)] = rows
    return {"runs": out}
