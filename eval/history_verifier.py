"""Should a verifier of revisions see the attempts before? python -m eval.history_verifier RUN [RUN ...] [--round 1] [--attempts 16]

The paper trains its verifier of revisions with the revision history in its context (Snell et al.,
6.1 and appendix J). Four verifiers judge the same chains on the test questions, best-of-N weighted over the chain:

- prm: the round's PRM, each attempt by itself, as the loop does;
- prm+history: the same adapter, with up to `reviser.context` earlier attempts before the attempt's own text;
- own: an adapter trained on the round's own revision chains of training questions, each step with the
  attempt's outcome, each attempt by itself;
- own+history: the same, trained and read with the earlier attempts.

Prints JSON: accuracy by verifier with 95% intervals over questions (runs averaged question by
question), within-question AUC, and paired gains over the first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flywheel.search.tools import Tools

from eval.cli import answer
from eval.verifiers import AGGREGATES, averaged
from flywheel.errors import UserError
from flywheel.ledger import Ledger
from flywheel.measure.stats import bootstrap_mean, paired_gain
from flywheel.models.prm import aggregate, encode, label_ids
from flywheel.models.prompts import Prompts
from flywheel.recipe import load
from flywheel.records import Grade, ModelRef, Problem, Revise, Role, Solution, Split
from flywheel.runs.files import read_table
from flywheel.runs.run import Context, Stage, fill
from flywheel.runs.shards import shard_dirs
from flywheel.search.select import majority, weighted
from flywheel.stages.kit import answer_is_right, by_question, ids, kit, searchers, text_tools
from flywheel.training import Job, PrmExample, train_prm

READS = ("train_prm", "choose_reviser", "gate@-1?", "distill@-1?")


def chains(
    run: Path, round: int, split: Split, strategy: Revise, count: int | None, reviser: ModelRef | None = None
) -> tuple[list[list[Solution]], dict[str, bool]]:
    """Chains of a reviser (the round's) on a split, kept in RUN/studies: each in order, and what is right. `strategy` asks no PRM."""

    def work(ctx, open_kit, questions):
        tools = Tools(None, None, open_kit.engine(Role.REVISER), open_kit.prompts, open_kit.reader, ctx.recipe.sample)
        yield from open_kit.searched(questions, tools, lambda q: strategy, f"r{round}/history")

    def tools(ctx):
        if (ref := reviser or searchers(ctx).get(Role.REVISER)) is None:
            raise UserError(f"{run}: round {round} has no reviser")
        return kit(ctx, {Role.REVISER: ref}, split)

    title = (
        f"chains_{split}_{strategy.length}x{strategy.chains}"
        + (f"_first_{count}" if count else "")
        + (f"_{reviser.name}" if reviser else "")
    )
    stage = Stage(
        title,
        (),
        READS,
        items=lambda ctx: ids(ctx, split)[:count],
        tools=tools,
        work=work,
        test_split=split is Split.TEST,
    )
    ctx = Context(load(run / "recipe.yaml"), run, round, stage)
    ctx.dir = run / "studies" / f"round_{round}" / title
    ctx.dir.mkdir(parents=True, exist_ok=True)
    fill(ctx)
    made: dict[tuple[str, int], list[Solution]] = {}
    for question, group in by_question(_read(ctx, Solution)).items():
        for s in sorted(group, key=lambda s: int(s.id.rpartition("/")[2])):
            made.setdefault((question, int(s.id.rpartition("/")[2]) // strategy.length), []).append(s)
    return list(made.values()), {g.solution_id: g.correct for g in _read(ctx, Grade)}


def _read(ctx: Context, kind: type) -> list:
    return [row for shard in shard_dirs(ctx.dir) for row in read_table(shard / f"{kind.__name__}.parquet", kind)]


def example(
    prompts: Prompts,
    problem: Problem,
    chain: Sequence[Solution],
    place: int,
    context: int,
    longest: int,
    value: float = 0.0,
) -> PrmExample:
    """The attempt at `place` as a PRM reads it, after up to `context` earlier ones that have an answer."""
    tokens, reads = encode(prompts, problem.question, chain[place].steps)
    seen = [s for s in chain[:place] if s.answer is not None][-context:] if context else []
    while seen and len(prompts.revise(problem.question, seen)) + len(tokens) > longest:
        seen = seen[1:]  # as a revision's own prompt does, where the model is too short
    before = prompts.revise(problem.question, seen) if seen else []
    return PrmExample(
        (*before, *tokens),
        tuple(len(before) + read for read in reads),
        (value,) * len(reads),
        question_id=problem.question.id,
    )


def study(run: Path, round: int, attempts: int) -> dict[str, dict[str, float]]:
    """verifier -> question -> 1.0 where the answer selected from the chain is right; `auc:` rows have one value, under ""."""
    from flywheel.training.scores import score_all, within_question_auc

    recipe = load(run / "recipe.yaml")
    train, train_right = chains(run, round, Split.TRAIN, Revise(4, 2, "majority"), 300)
    test, right = chains(run, round, Split.TEST, Revise(attempts, 1, "majority"), None)
    reader = Context(recipe, run, round, Stage("history_verifier", (), READS, train=lambda ctx: {}, test_split=True))
    problems = {p.question.id: p for p in reader.problems(Split.TRAIN, Split.TEST)}
    prompts, _ = text_tools(reader)
    labels, base, context = label_ids(prompts.tokenizer, recipe.prm.labels), recipe.model.base, recipe.reviser.context
    spec = recipe.prm.model_copy(update={"target": "value", "max_length": recipe.engine.max_model_len})
    held = set(sorted({chain[0].question_id for chain in train})[::10])
    adapters = {"prm": str(reader.path("train_prm") / "adapter")}
    adapters["prm+history"] = adapters["prm"]
    for name, shown in (("own", 0), ("own+history", context)):
        rows = [
            (
                s.question_id in held,
                example(prompts, problems[s.question_id], chain, i, shown, spec.max_length, float(train_right[s.id])),
            )
            for chain in train
            for i, s in enumerate(chain)
            if s.answer is not None
        ]
        out = run / "studies" / f"round_{round}" / f"verifier_{name}"
        train_prm(
            [e for kept, e in rows if not kept],
            [e for kept, e in rows if kept],
            labels,
            Job(recipe.model, spec, out, recipe.seed, "best", Role.PRM, Ledger("history", round)),
        )
        adapters[name] = str(out / "adapter")
    readable = [(chain, i) for chain in test for i, s in enumerate(chain) if s.answer is not None]
    results = {"majority": {c[0].question_id: answer_is_right(majority([s.answer for s in c]), c, right) for c in test}}
    for name, adapter in adapters.items():
        shown = context if name.endswith("+history") else 0
        values = score_all(
            base,
            adapter,
            [example(prompts, problems[c[i].question_id], c, i, shown, spec.max_length) for c, i in readable],
            labels,
            ledger=Ledger("history", round),
        )
        for how in AGGREGATES:
            score = {c[i].id: aggregate(v, how) for (c, i), v in zip(readable, values)}
            results[f"{name}:{how}"] = {
                c[0].question_id: answer_is_right(
                    weighted([s.answer for s in c], [score.get(s.id, 0.0) for s in c]), c, right
                )
                for c in test
            }
            results[f"auc:{name}:{how}"] = {
                "": within_question_auc(
                    *zip(*((score[c[i].id], right[c[i].id], c[i].question_id) for c, i in readable))
                )
            }
    return results


def _mean(areas: Sequence[float | None]) -> float | None:
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else None


def report(studies: Sequence[dict[str, dict[str, float]]], chosen: str) -> dict:
    methods, plain = [m for m in studies[0] if not m.startswith("auc:")], f"prm:{chosen}"
    return {
        "questions": len(averaged(studies, "majority")),
        "accuracy": {m: bootstrap_mean(averaged(studies, m)) for m in methods},
        f"over_{plain}": {
            m: paired_gain(averaged(studies, plain), averaged(studies, m)) for m in methods if m != plain
        },
        "auc_within_question": {m[4:]: _mean([s[m][""] for s in studies]) for m in studies[0] if m.startswith("auc:")},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.history_verifier", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--attempts", type=int, default=16)
    args = parser.parse_args(argv)
    return answer(
        lambda: report(
            [study(run, args.round, args.attempts) for run in args.runs],
            load(args.runs[0] / "recipe.yaml").prm.aggregate,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
