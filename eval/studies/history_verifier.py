"""Should a verifier of revisions see the attempts before?

The paper trains its verifier of revisions with the revision history in its context (Snell et al., 6.1 and appendix
J). Four verifiers judge the same chains on the test questions, best-of-N weighted over the chain:

- prm: the round's PRM, each attempt by itself, as the loop does;
- prm+history: the same adapter, with up to `reviser.context` earlier attempts before the attempt's own text;
- own: an adapter trained on the round's own revision chains of training questions, each step with the attempt's
  outcome, each attempt by itself;
- own+history: the same, trained and read with the earlier attempts.

Accuracy by verifier with 95% intervals over questions (runs averaged question by question), within-question AUC, and
paired gains over the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from eval.shared import Verified, add_runs, chains, fit_prm, folder, over_runs, step_values, verifier_figures
from flywheel.measure.stats import bootstrap_runs
from flywheel.models.prompts import Prompts
from flywheel.records import Problem, Solution, Split
from flywheel.runs.run import Run
from flywheel.search.revise import Revise
from flywheel.search.select import majority
from flywheel.stages.kit import prompts_and_reader
from flywheel.stages.shared import answer_is_right
from flywheel.training import PrmExample

TRAINED_ON = 300  # training questions, two chains of four attempts each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--attempts", type=int, default=16, help="of a chain (%(default)s)")


def example(
    prompts: Prompts, problem: Problem, chain: Sequence[Solution], place: int, context: int, longest: int, value=0.0
) -> PrmExample:
    """The attempt at index `place` as a PRM's input, after up to `context` earlier attempts that have an answer."""
    tokens, reads = prompts.check(problem.question, chain[place].steps)
    shown = [s for s in chain[:place] if s.answer is not None][-context:] if context else []
    while shown and len(prompts.revise(problem.question, shown)) + len(tokens) > longest:
        shown = shown[1:]  # drop the oldest until it fits, as `revision_prompt` does
    before = prompts.revise(problem.question, shown) if shown else []
    reads = tuple(len(before) + read for read in reads)
    return PrmExample((*before, *tokens), reads, (value,) * len(reads), question_id=problem.id)


def judge(run: Run, round: int, attempts: int) -> Verified:
    recipe, (prompts, _) = run.recipe, prompts_and_reader(run)
    train, train_right = chains(run, round, Split.TRAIN, Revise(4, 2, "majority"), TRAINED_ON)
    test, right = chains(run, round, Split.TEST, Revise(attempts, 1, "majority"))
    problems = {p.id: p for p in run.problems(Split.TRAIN, Split.TEST)}
    spec = recipe.prm.model_copy(update={"target": "value", "max_length": recipe.engine.max_model_len})

    def readable(made: Sequence[Sequence[Solution]], context: int, right: dict[str, bool]) -> dict[str, PrmExample]:
        """Solution id -> example, for every attempt with an answer; its outcome is the value of every step."""
        return {
            s.id: example(prompts, problems[s.question_id], chain, i, context, spec.max_length, float(right[s.id]))
            for chain in made
            for i, s in enumerate(chain)
            if s.answer is not None
        }

    held = set(sorted({chain[0].question_id for chain in train})[::10])
    round_s = str(run.path("train_prm", round) / "adapter")
    adapters = {"prm": (round_s, 0), "prm+history": (round_s, recipe.reviser.context)}
    for name, shown in (("own", 0), ("own+history", recipe.reviser.context)):
        rows = list(readable(train, shown, train_right).values())
        fit, check = ([e for e in rows if (e.question_id in held) is kept] for kept in (False, True))
        adapters[name] = fit_prm(run, folder(run, round) / f"verifier_{name}", fit, check, spec), shown
    groups = {chain[0].question_id: chain for chain in test}
    found = Verified()
    found.accuracy["majority"] = {
        question: answer_is_right(majority([s.answer for s in chain]), chain, right)
        for question, chain in groups.items()
    }
    for name, (adapter, shown) in adapters.items():
        rows = readable(test, shown, right)
        found.add(name, groups, dict(zip(rows, step_values(run, adapter, list(rows.values())))), right)
    return found


def measure(args: argparse.Namespace) -> dict:
    runs = [judge(run, args.round, args.attempts) for run in args.runs]
    by_name = {name: over_runs([run.accuracy[name] for run in runs]) for name in runs[0].accuracy}
    plain = f"prm:{args.runs[0].recipe.prm.aggregate}"
    return {
        "questions": by_name["majority"].shape[1],
        **verifier_figures(runs),
        f"over_{plain}": {m: bootstrap_runs(values - by_name[plain]) for m, values in by_name.items() if m != plain},
    }
