"""Claims that studies of their own measure: what they printed, kept beside the claims, as rows of the same table.

    python -m eval.STUDY ... > eval/results/STUDY.json      then      python -m eval.claims RUN

A study that has not been kept has no row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from flywheel.errors import UserError

Found = tuple[
    str, str, str, Sequence[float], str, Sequence[float]
]  # id, claim, paper, (mean, low, high), unit, each run's own


def history_verifier(data: dict) -> Iterator[Found]:
    """The verifier of revisions, 6.1."""
    [(plain, gains)] = [(key.removeprefix("over_"), value) for key, value in data.items() if key.startswith("over_")]
    how = plain.partition(":")[2]
    for name in (f"prm+history:{how}", f"own+history:{how}"):
        yield (
            f"history.{name}",
            f"A verifier that sees the revision history ({name}) is ahead of the round's PRM ({plain}) on the same chains",
            "used",
            gains[name],
            "accuracy",
            gains[name][:1],
        )


def on_policy_reviser(data: dict) -> Iterator[Found]:
    gain, each = (
        data["on_less_off_policy"],
        {name: [-value for value in values] for name, values in data["each_run"].items()},
    )
    trained = ", ".join(map(str, data["trajectories"]))
    yield (
        "11.slope",
        f"On-policy data hurt the reviser: the slope along the chain falls ({trained} trajectories each)",
        "hurt",
        minus(gain["slope"]),
        "accuracy",
        each["slope"],
    )
    yield "11.first", "and so does its first attempt", "not said", minus(gain["first"]), "accuracy", each["first"]


def foreign_prm(data: dict) -> Iterator[Found]:
    last, each = max(data["own_less_other"]["weighted"], key=int), data["each_run"]
    for how in ("weighted", "best"):
        lead = data["own_less_other"][how][last]
        yield (
            f"12.worse:{how}",
            f"A PRM trained on its own model's samples is ahead of one trained on another's, best-of-{last} by {how}",
            "ahead",
            lead,
            "accuracy",
            each[how],
        )
    falls = data["other_falls_more"]
    yield (
        "12.exploited",
        "The other's is exploited more: the single best score falls further from its best n",
        "more",
        falls,
        "accuracy",
        each["exploited"],
    )


def flops_matched(data: dict) -> Iterator[Found]:
    for row in data["by_ratio"]:
        ratio, times = row["R"], f"M = {data['M']:.1f}, {row['multiplier']:.0f} times the inference"
        few = ratio < 1
        yield (
            f"13.all@{ratio:g}",
            f"At R = {ratio:g} ({times}) test-time compute is ahead of the larger model",
            "ahead in bins 1-4" if few else "behind on the hardest",
            row["lead"],
            "accuracy",
            row["lead"][:1],
        )
        for part in row["by_bin"]:
            hard = part["bin"] == 5
            claim = (
                f"the larger model is ahead in bin {part['bin']}"
                if hard
                else f"test-time compute is ahead in bin {part['bin']}"
            )
            paper = ("pretraining wins" if hard else "test-time compute wins") if few or hard else "mixed"
            lead = minus(part["lead"]) if hard else part["lead"]
            yield f"13.bin{part['bin']}@{ratio:g}", f"At R = {ratio:g} {claim}", paper, lead, "accuracy", lead[:1]


def compare(data: dict) -> Iterator[Found]:
    loop = Path(next(iter(data["runs"]))).name
    for run, found in data["first_less_others"].items():
        ends = found["within_the_other_s_flops"][-1]
        ours, theirs = ends["flops"]
        rounds = " and ".join(map(str, ends["rounds"]))
        claim = f"Single samples of `{loop}` are ahead of those of `{Path(run).name}` for no more FLOPs (rounds {rounds}, {ours / 1e12:.1f} and {theirs / 1e12:.1f} TFLOPs)"
        yield f"15.{Path(run).name}", claim, "not measured", ends["pass@1"], "pass@1", ends["pass@1"][:1]


STUDIES = {
    study.__name__: study for study in (history_verifier, on_policy_reviser, foreign_prm, flops_matched, compare)
}


def minus(interval: Sequence[float]) -> list[float]:
    mean, low, high = interval
    return [-mean, -high, -low]


def kept(folder: Path) -> Iterator[tuple[Found, str]]:
    """(row, command) of every study whose JSON lies in `folder`, `compare` perhaps in several files. Raises UserError."""
    for name, study in STUDIES.items():
        for path in sorted(folder.glob(f"{name}*.json")):
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                rows = [(found, data["command"]) for found in study(data)]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}: not what eval.{name} prints ({type(error).__name__}: {error}); run it again, or delete the file"
                ) from None
            yield from rows
