"""Per-question results of a run's rounds, for the claims about distillation."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from eval.claims.study import BINS
from eval.shared import answers
from flywheel.measure.bins import fixed_bins
from flywheel.runs.run import Run
from flywheel.stages.shared import test_rates


class Rounds:
    """All arrays are over `questions`, the test questions that the loop evaluates, in that order.

    last: the round whose policy is compared with round 0's; of several runs it is the last that all have reached.
    """

    def __init__(self, run: Run, last: int):
        self.run, self.last = run, last
        self.questions = sorted(test_rates(run, 0))

    def rates(self, round: int) -> np.ndarray:
        found = test_rates(self.run, round)
        return np.array([found[q] for q in self.questions])

    @cached_property
    def _answers(self) -> dict[str, dict[str, float]]:
        return answers(self.run, 1)

    @property
    def search(self) -> str:
        """The name of round 1's best-of-N weighted with most samples."""
        names = [m for m in self._answers if m.startswith("best_of_n_weighted@") and m[-1].isdigit()]
        return max(names, key=lambda m: int(m.split("@")[1]))

    def searched(self, method: str) -> np.ndarray:
        return np.array([self._answers[method][q] for q in self.questions])

    def gain_on_hardest(self) -> np.ndarray:
        """pass@1 after the last round minus pass@1 of round 0 (not the samples that bin); NaN outside fixed bin 5."""
        start = fixed_bins(test_rates(self.run, 0, "bin"), self.run.recipe.calibrate.edges)
        hard = np.array([start[q] == BINS for q in self.questions])
        return np.where(hard, self.rates(self.last) - self.rates(0), np.nan)
