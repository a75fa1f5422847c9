"""How well a verifier's step values find the first wrong step, as ProcessBench counts it.

Zheng et al. 2024 (arXiv 2412.06559): on solutions with an error the first wrong step must be named, on right ones none;
F1 is the harmonic mean of the two accuracies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import harmonic_mean

Values = Sequence[Sequence[float]]  # by solution, the value in [0, 1] after each of its steps
Wrong = Sequence[int | None]  # by solution, the index of its first wrong step; None if there is none


@dataclass(frozen=True, slots=True)
class StepErrors:
    """on_wrong, on_right: accuracies on solutions with and without an error; f1: their harmonic mean."""

    f1: float
    on_wrong: float
    on_right: float


def step_errors(values: Values, wrong: Wrong, threshold: float) -> StepErrors:
    """A step is called wrong if its value is below `threshold`.

    Raises ValueError if all solutions are right or all have an error: F1 is not defined then.
    """
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for steps, truth in zip(values, wrong, strict=True):
        called = next((i for i, value in enumerate(steps) if value < threshold), None)
        hits[truth is None].append(called == truth)
    if not all(hits.values()):
        raise ValueError("solutions with and without an error are needed")
    on_wrong, on_right = (sum(hits[kind]) / len(hits[kind]) for kind in (False, True))
    return StepErrors(harmonic_mean([on_wrong, on_right]), on_wrong, on_right)


def best_threshold(values: Values, wrong: Wrong, candidates: int = 200) -> float:
    """The threshold with the highest F1 among up to `candidates` quantiles of all values. Raises as `step_errors`."""
    seen = sorted({value for steps in values for value in steps})
    tried = [seen[i * len(seen) // candidates] for i in range(candidates)] if len(seen) > candidates else seen
    return max([*tried, 1.0], key=lambda threshold: step_errors(values, wrong, threshold).f1)
