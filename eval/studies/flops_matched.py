"""Test-time compute or parameters? A small model's run against a larger model, at equal FLOPs.

Snell et al., section 7, claim 13. RUN is a finished run of a small model with its draws (`python -m eval study RUN`),
--larger a larger model of the same family, trained on the same data. The larger answers greedily, once. The small one
may spend, on each question, as many inference FLOPs as make both models cost the same over training and use: 2 N
D_inf times M + 3 (M - 1) / R, with R = D_inf / D_pre. Under that allowance each difficulty bin (oracle bins of the
small model) gets the strategy that was best on one half of the questions, and is scored on the other.

M, and for each R the accuracy of both and the small model's lead, over all and by bin, with 95% intervals over
questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np

from eval.claims.study import BINS, Study
from eval.draws import add_sizes, check_sizes, read_all
from eval.shared import whole_test
from eval.studies.greedy import greedy
from flywheel.errors import UserError
from flywheel.measure.stats import bootstrap_mean
from flywheel.models.weights import load_tokenizer, parameters
from flywheel.records import ModelRef
from flywheel.search.best_of_n import BestOfN

RATIOS = (0.16, 0.79, 22.0)  # D_inf / D_pre, as in the paper


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser)
    parser.add_argument("--larger", required=True, metavar="MODEL", help="a model directory")


def multiplier(times: float, ratio: float) -> float:
    """The factor on inference FLOPs by which a small model costs as much as one `times` its size (Snell et al., 7).

    A model of M N parameters costs 6 M N D_pre + 2 M N D_inf, the small one 6 N D_pre + m 2 N D_inf. With
    R = D_inf / D_pre = `ratio` and M = `times`, the costs are equal for m = M + 3 (M - 1) / R.
    """
    return times + 3 * (times - 1) / ratio


def best_within(study: Study, tokens: float) -> tuple[np.ndarray, list[list[str]]]:
    """(accuracy per question, strategy names by half and bin) of each bin's best strategy of mean cost <= `tokens`.

    The strategy is chosen on the other half of the questions; a single sample if none is cheap enough.
    """
    options, bins = study.options(), study.bins("oracle")
    right, chosen = np.zeros(len(bins)), []
    for fit, use in study.halves():
        chosen.append([])
        for b in range(1, BINS + 1):
            mine, theirs = fit[bins[fit] == b], use[bins[use] == b]
            fits = {s: row[mine].mean() for s, (row, cost) in options.items() if cost[mine].mean() <= tokens}
            best = max(fits, key=fits.__getitem__, default=BestOfN(1, "majority"))
            right[theirs] = options[best][0][theirs]
            chosen[-1].append(best.name)
    return right, chosen


def compare(study: Study, larger: Mapping[str, float], answer_tokens: float, times: float) -> dict:
    """The study's figures. `larger`: accuracy by question; `answer_tokens`: tokens per answer of it; `times`: M."""
    theirs, bins, rows = np.array([larger[q] for q in study.questions]), study.bins("oracle"), []
    for ratio in RATIOS:
        allowed = multiplier(times, ratio)
        ours, chosen = best_within(study, allowed * answer_tokens)
        lead, inside = ours - theirs, {b: bins == b for b in range(1, BINS + 1)}
        rows.append(
            {
                "R": ratio,
                "multiplier": allowed,
                "tokens": allowed * answer_tokens,
                "small": bootstrap_mean(ours),
                "lead": bootstrap_mean(lead),
                "by_bin": [
                    {"bin": b, "small": ours[m].mean(), "larger": theirs[m].mean(), "lead": bootstrap_mean(lead[m])}
                    for b, m in inside.items()
                ],
                "strategies": chosen,
            }
        )
    larger_greedy = bootstrap_mean(theirs)
    return {"M": times, "larger_greedy": larger_greedy, "tokens_of_an_answer": answer_tokens, "by_ratio": rows}


def measure(args: argparse.Namespace) -> dict:
    check_sizes(args)
    if len(args.runs) > 1:
        raise UserError("one run at a time")
    run = whole_test(args.runs[0])
    base, larger = run.recipe.model.base, ModelRef("larger", args.larger)
    if load_tokenizer(base).get_vocab() != load_tokenizer(larger.base).get_vocab():
        raise UserError(f"{larger.base}: its tokenizer is not that of {base}; a larger model of the same family wanted")
    study = Study(*read_all(run, args), seed=0)
    right, answer_tokens = greedy(run, larger, study.questions)
    return compare(study, right, answer_tokens, parameters(larger) / parameters(ModelRef("small", base)))
