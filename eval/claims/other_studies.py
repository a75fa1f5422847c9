"""Claims measured by other studies: their stored output in eval/results/ as rows of the same table.

    python -m eval STUDY RUN... > eval/results/STUDY.json      then      python -m eval claims RUN...

A study without stored output has no row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from eval.claims.results import Claim, verdict
from flywheel.errors import UserError

Interval = Sequence[float]  # mean, low, high
Found = tuple[str, str, str, Interval, Sequence[float]]  # id, claim, paper's result, ours, value of each run


def history_verifier(data: dict) -> Iterator[Found]:
    """The verifier of revisions (Snell et al., 6.1)."""
    [(plain, gains)] = [(key.removeprefix("over_"), value) for key, value in data.items() if key.startswith("over_")]
    how = plain.partition(":")[2]
    for name in (f"prm+history:{how}", "own+history:last"):  # its own was trained on outcomes: the last value is one
        ours = f"A verifier that sees the revision history ({name})"
        claim = f"{ours} is ahead of the round's PRM ({plain}) on the same chains"
        yield f"history.{name}", claim, "used", gains[name], gains[name][:1]


def on_policy_reviser(data: dict) -> Iterator[Found]:
    gain, each = data["on_less_off_policy"], {k: [-v for v in values] for k, values in data["each_run"].items()}
    trained = ", ".join(map(str, data["trajectories"]))
    claim = f"On-policy data hurt the reviser: the slope along the chain falls ({trained} trajectories each)"
    yield "11.slope", claim, "hurt", minus(gain["slope"]), each["slope"]
    yield "11.first", "and so does its first attempt", "not said", minus(gain["first"]), each["first"]


def foreign_prm(data: dict) -> Iterator[Found]:
    last, each = max(data["own_less_other"]["weighted"], key=int), data["each_run"]
    for how in ("weighted", "best"):
        claim = (
            f"A PRM trained on its own model's samples is ahead of one trained on another's, best-of-{last} by {how}"
        )
        yield f"12.worse:{how}", claim, "ahead", data["own_less_other"][how][last], each[how]
    claim = "The other's is exploited more: the single best score falls further from its best n"
    yield "12.exploited", claim, "more", data["other_falls_more"], each["exploited"]


def flops_matched(data: dict) -> Iterator[Found]:
    for row in data["by_ratio"]:
        ratio, few = row["R"], row["R"] < 1
        claim = (
            f"At R = {ratio:g} (M = {data['M']:.1f}, {row['multiplier']:.0f} times the inference) test-time compute is "
            "ahead of the larger model"
        )
        paper = "ahead in bins 1-4" if few else "behind on the hardest"
        yield f"13.all@{ratio:g}", claim, paper, row["lead"], row["lead"][:1]
        for part in row["by_bin"]:
            bin, hard = part["bin"], part["bin"] == 5
            claim = f"At R = {ratio:g} {'the larger model' if hard else 'test-time compute'} is ahead in bin {bin}"
            paper = "pretraining wins" if hard else "test-time compute wins" if few else "mixed"
            lead = minus(part["lead"]) if hard else part["lead"]
            yield f"13.bin{bin}@{ratio:g}", claim, paper, lead, lead[:1]


def compare(data: dict) -> Iterator[Found]:
    """Older files have no row at equal FLOPs, and so give none."""
    loop = group(next(iter(data["runs"])))
    for runs, found in data["first_less_others"].items():
        if not (ends := found.get("at_equal_flops")):
            continue
        other = group(runs)
        ours, theirs = (flops / 1e12 for flops in ends["flops"])
        claim = (
            f"Single samples of `{loop}` are ahead of those of `{other}` for no more FLOPs "
            f"(rounds {' and '.join(f'{r:.3g}' for r in ends['rounds'])}, {ours:.1f} and {theirs:.1f} TFLOPs)"
        )
        yield f"15.{loop}:{other}", claim, "not measured", ends["pass@1"], ends["pass@1_each_run"]


def coverage(data: dict) -> Iterator[Found]:
    each = data["each_run"]
    for way, rival in (("uniform", "uniform samples"), ("until", "samples until a question is covered")):
        claim = f"The harvest plan covers more training questions than {rival} for no more tokens (round 1)"
        alone = [ours - theirs for ours, theirs in zip(each["plan"], each[way], strict=True)]
        yield f"harvest.{way}", claim, "not compared", data["plan_less"][way], alone


def group(runs: str) -> str:
    """The name of a run, or of several seeds of a recipe: `restem` of `runs/restem_s0 runs/restem_s1`."""
    names = [Path(run).name for run in runs.split()]
    return names[0] if len(names) == 1 else re.sub(r"_s\d+$", "", names[0])


STUDIES = (history_verifier, on_policy_reviser, foreign_prm, flops_matched, compare, coverage)
UNITS = {compare: "pass@1", coverage: "share of questions"}


def minus(interval: Interval) -> list[float]:
    mean, low, high = interval
    return [-mean, -high, -low]


def kept(folder: Path) -> list[Claim]:
    """The rows of every study with JSON files in `folder`. Raises UserError for a file of another form."""
    out = []
    for study in STUDIES:
        for path in sorted(folder.glob(f"{study.__name__}*.json")):
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                for id, claim, paper, (mean, low, high), alone in study(data):
                    unit = UNITS.get(study, "accuracy")
                    decided = verdict(low, high)
                    out.append(Claim(id, claim, paper, mean, low, high, decided, unit, list(alone), data["command"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}: not what eval {study.__name__} prints ({type(error).__name__}: {error}); run it again,"
                    " or delete the file"
                ) from None
    return out
