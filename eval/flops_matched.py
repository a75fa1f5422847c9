"""Test-time compute or parameters? python -m eval.flops_matched RUN --larger MODEL [--round 1] (after eval.study RUN)

Snell et al., section 7, claim 13. RUN is a finished run of a small model, MODEL a larger one of the same family,
trained on the same data. The larger answers greedily, once. The small one may spend, on each question, as many
inference FLOPs as make both models cost the same over training and use: 2 N D_inf times M + 3 (M - 1) / R, with
R = D_inf / D_pre (`eval.claims.multiplier`). Under that allowance each difficulty bin (oracle bins of the small
model) gets the strategy that was best on one half of the questions, and is scored on the other.

Prints JSON: M, and for each R the accuracy of both and the small model's lead, over all and by bin, with 95%
intervals over questions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from eval.claims import BINS, Study, multiplier
from eval.cli import answer
from eval.greedy import greedy, reader
from eval.study import arguments as sizes
from eval.study import read_all
from flywheel.errors import UserError
from flywheel.measure.stats import bootstrap_mean
from flywheel.models.weights import load_tokenizer, parameters
from flywheel.recipe import load
from flywheel.records import ModelRef

RATIOS = (0.16, 0.79, 22.0)  # D_inf / D_pre, the paper's


def best_within(study: Study, tokens: float) -> tuple[np.ndarray, list[list[str]]]:
    """Accuracy of each question by the strategy that its bin did best with on the other half, of mean cost at most `tokens`."""
    options = {
        f"best_of_n:{n}:{how}": (study.best_of_n(n, how), study.best_of_n_tokens(n, how))
        for n in study.sizes
        for how in ("weighted", "majority")
    }
    options |= {name: (study.row(b, name), study.row(b, name, "tokens")) for b, name in study.tried}
    bins, order = study.bins("oracle"), np.random.default_rng(study.seed).permutation(len(study.questions))
    right, chosen = np.zeros(len(order)), []
    for fit, use in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        chosen.append([])
        for b in range(1, BINS + 1):
            mine, theirs = fit[bins[fit] == b], use[bins[use] == b]
            fits = {name: row[mine].mean() for name, (row, cost) in options.items() if cost[mine].mean() <= tokens} or {
                "best_of_n:1:majority": 0.0
            }
            name = max(fits, key=fits.__getitem__)
            right[theirs] = options[name][0][theirs]
            chosen[-1].append(name)
    return right, chosen


def compare(study: Study, larger: dict[str, float], answer_tokens: float, times: float) -> dict:
    theirs, bins = np.array([larger[q] for q in study.questions]), study.bins("oracle")
    out: dict = {
        "M": times,
        "larger_greedy": bootstrap_mean(theirs),
        "tokens_of_an_answer": answer_tokens,
        "by_ratio": [],
    }
    for ratio in RATIOS:
        allowed = multiplier(times, ratio) * answer_tokens
        ours, chosen = best_within(study, allowed)
        lead = ours - theirs
        out["by_ratio"].append(
            {
                "R": ratio,
                "multiplier": multiplier(times, ratio),
                "tokens": allowed,
                "small": bootstrap_mean(ours),
                "lead": bootstrap_mean(lead),
                "by_bin": [
                    {
                        "bin": b,
                        "small": ours[bins == b].mean(),
                        "larger": theirs[bins == b].mean(),
                        "lead": bootstrap_mean(lead[bins == b]),
                    }
                    for b in range(1, BINS + 1)
                ],
                "strategies": chosen,
            }
        )
    return out


def measure(args: argparse.Namespace, model: str) -> dict:
    if len(args.runs) > 1:
        raise UserError("one run at a time")
    run, round = args.runs[0], args.round
    base = load(run / "recipe.yaml").model.base
    if load_tokenizer(base).get_vocab() != load_tokenizer(model).get_vocab():
        raise UserError(f"{model}: its tokenizer is not that of {base}; a larger model of the same family wanted")
    study = Study(*read_all(run, args))
    right, answer_tokens = greedy(reader(run, round), ModelRef("larger", model), study.questions)
    times = parameters(ModelRef("larger", model)) / parameters(ModelRef("small", base))
    return compare(study, right, answer_tokens, times)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--larger", required=True)
    mine, rest = parser.parse_known_args(argv)
    args = sizes(rest, "python -m eval.flops_matched", __doc__.split("\n\n")[0])
    return answer(lambda: measure(args, mine.larger))


if __name__ == "__main__":
    sys.exit(main())
