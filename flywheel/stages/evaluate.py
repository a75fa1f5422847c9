"""Evaluate policy r on the test questions without search: the figures that measure the loop.

Only this stage and `search` read the test split. Round 0 samples twice: the first set assigns
the fixed bins of all later rounds and the second is scored, so no sample does both. Comparing
the two sets gives the migration between bins that is due to resampling alone. Beside the samples stands the greedy
answer: what a served model gives, and the cheapest answer that a search has to beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flywheel.measure.bins import fixed_bins, migration
from flywheel.measure.diversity import diversity
from flywheel.measure.stats import paired_gain
from flywheel.problems.grading import answer_key
from flywheel.records import Role, Split, Verdict
from flywheel.runs.run import Context
from flywheel.runs.stage import Input, Stage
from flywheel.search.select import majority
from flywheel.stages.kit import Kit, kit
from flywheel.stages.shared import answer_is_right, ids, interval, judged, rate, tallies, test_rates, verdict_counts


async def work(ctx: Context, kit: Kit, questions: Sequence[str]) -> list[object]:
    count = ctx.recipe.evaluate.samples
    sets: dict[str, tuple[int, dict]] = {"evaluate": (count, {}), "greedy": (1, {"temperature": 0.0})}
    if ctx.round == 0:
        sets = {"bin": (count, {}), **sets}

    async def one(question: str) -> list[object]:
        async def drawn(purpose: str) -> list[object]:
            count, changes = sets[purpose]
            return await kit.sampled(question, count, purpose=purpose, tag=f"r{ctx.round}/{purpose}", **changes)

        return await kit.each(sets, drawn)

    return await kit.each(questions, one)


def finish(ctx: Context) -> dict:
    edges, count = ctx.recipe.calibrate.edges, ctx.recipe.calibrate.bins
    verdicts = dict(tallies(ctx, "evaluate", ctx.round, "evaluate"))
    questions, now = sorted(verdicts), {q: rate(counts) for q, counts in verdicts.items()}
    k = ctx.recipe.evaluate.samples
    policy: dict = {"name": ctx.model(Role.POLICY, ctx.round).name, "n": len(questions), "samples": k}

    def put(name: str, values: Sequence[float], into: dict) -> None:
        into[name], into[f"{name}_ci"] = interval(ctx, values)

    put("pass@1", [now[q] for q in questions], policy)
    greedy = test_rates(ctx, ctx.round, "greedy")
    put("greedy@1", [greedy[q] for q in questions], policy)
    put(f"pass@{k}", [float(verdicts[q][Verdict.CORRECT] > 0) for q in questions], policy)
    voted, spread = {}, []
    for q, group in judged(ctx, "evaluate", ctx.round, "evaluate"):
        samples = [(s, verdict is Verdict.CORRECT) for s, verdict in group]
        solutions, correct = [s for s, _ in samples], {s.id: right for s, right in samples}
        voted[q] = answer_is_right(majority([s.answer for s in solutions]), solutions, correct)
        spread.append(diversity(samples, answer_key))
    put(f"majority@{k}", [voted[q] for q in questions], policy)
    policy |= {name: sum(one[name] for one in spread) / len(spread) for name in spread[0]}
    policy["verdicts"] = verdict_counts(verdicts.values())

    bins, start, start_greedy = (test_rates(ctx, 0, purpose) for purpose in ("bin", "evaluate", "greedy"))
    start_bins, bins_now = fixed_bins(bins, edges), fixed_bins(now, edges)
    last = test_rates(ctx, ctx.round - 1) if ctx.round else start

    def gain(before: Mapping[str, float], after: Mapping[str, float], among: Sequence[str]) -> list[float]:
        seed = ctx.seed("bootstrap") % 2**31
        return list(paired_gain([before[q] for q in among], [after[q] for q in among], seed=seed))

    table = []
    for b in range(1, count + 1):
        inside = [q for q in questions if start_bins[q] == b]
        row: dict = {"bin": b, "n": len(inside)}
        if inside:
            put("pass@1", [now[q] for q in inside], row)
            if ctx.round:
                row |= {"gain": gain(start, now, inside), "gain_from_last_round": gain(last, now, inside)}
        table.append(row)
    figures = {"policy": policy, "fixed_bins": table}
    if ctx.round:
        figures |= {
            "migration": migration(start_bins, bins_now, count),
            "migration_last": migration(fixed_bins(last, edges), bins_now, count),
            # by chance alone: both sets of samples are of one model, so nothing is learned between them
            "migration_null": migration(start_bins, fixed_bins(start, edges), count),
            "gain": {
                "from_round_0": gain(start, now, questions),
                "from_last_round": gain(last, now, questions),
                "greedy_from_round_0": gain(start_greedy, greedy, questions),
            },
        }
    return figures


STAGE = Stage(
    name="evaluate",
    sections=("problems", "model", "engine", "prompts", "sample", "evaluate", "calibrate.edges", "calibrate.bins"),
    inputs=(
        Input("gate", optional=True),
        Input("distill", optional=True),
        Input("evaluate", of=0),
        Input("evaluate", back=1),
    ),
    items=lambda ctx: ids(ctx, Split.TEST),
    open=lambda ctx: kit(ctx, {Role.POLICY: ctx.model(Role.POLICY, ctx.round)}, Split.TEST),
    work=work,
    finish=finish,
    test_split=True,
)
