"""The figures of a run as text tables, at most 100 characters wide."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import TextIO

WIDTH = 100  # characters


def print_all(data: dict) -> None:
    """Print everything in a `summary` as tables."""
    console = _console()
    console.print(f"recipe {data['recipe']}, {data['finished_rounds']} rounds finished after the base")
    for item in data["rounds"]:
        print_round(data, item["round"])
    for item in data.get("unfinished", []):
        console.print(f"round {item['round']} under way: {', '.join(item['finished_stages'])} done")
    ledger = data["ledger"]
    tokens, cached, flops = ledger["tokens"], ledger["tokens_cached"], ledger["flops_by_role"]
    table = _table("ledger", "role", "tokens", "of these cached", "FLOPs")
    for role in tokens:
        table.add_row(role, f"{tokens[role]:,}", f"{cached.get(role, 0):,}", f"{flops.get(role, 0.0):.3g}")
    table.add_row("all", f"{sum(tokens.values()):,}", f"{sum(cached.values()):,}", f"{ledger['flops']:.3g}")
    console.print(table)
    by_stage = ledger["tokens_by_stage"]
    table = _table("by stage", "stage", "tokens", "seconds")
    for stage, seconds in ledger["seconds"].items():
        table.add_row(stage, f"{by_stage.get(stage, 0):,}", f"{seconds:,.1f}")
    table.add_row("all", f"{sum(by_stage.values()):,}", f"{data['wall_seconds']:,.1f}")
    console.print(table)


def print_round(data: dict, round: int, file: TextIO | None = None) -> None:
    """Print one round of a `summary`: the fixed bins, then every figure with its interval and its models.

    Raises ValueError if the round is not finished.
    """
    rounds = {item["round"]: item for item in data["rounds"]}
    if round not in rounds:
        raise ValueError(f"round {round} is not finished")
    now, before = rounds[round], rounds.get(round - 1)
    console = _console(file)
    console.print(_bins(now, before))
    for title, rows in figures(now):
        if rows:
            table = _table(f"round {round}: {title}", "figure", "value, 95% interval", "by")
            for row in rows:
                table.add_row(*row)
            console.print(table)
    for line in remarks(now):
        console.print(line)
    if shown := data["base_shown"]:
        console.print(f"policy_0, the base, is shown {shown} worked examples with a question; later policies none")


def print_untested(now: dict) -> None:
    """Print a round without its test, as `summary.untested` gives it."""
    console = _console()
    if now["round"]:
        table = _table(f"round {now['round']}: serve plan", "budget", "accuracy, held out", "tokens")
        for row in now["serve"]:
            table.add_row(str(row["budget"]), _number(row["accuracy"]), f"{row['tokens']:,.0f}")
        console.print(table)
    for line in remarks(now):
        console.print(line)
    console.print(f"round {now['round']}: test questions were not read (--no-test)")


def _console(file: TextIO | None = None):
    from rich.console import Console

    file = file or sys.stdout
    width = min(WIDTH, shutil.get_terminal_size().columns) if file.isatty() else WIDTH
    return Console(file=file, width=width, highlight=False, markup=False, emoji=False)


def _table(title: str, *columns: str):
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, title_style="bold")
    for i, column in enumerate(columns):
        is_name = i == 0 or column == "by"  # names may wrap, figures must not
        justify = "left" if is_name or "interval" in column else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=not is_name)
    return table


def _bins(now: dict, before: dict | None):
    name, bins = now["policy"]["name"], now.get("fixed_bins", [])
    if before is None:
        title = f"round {now['round']}: {name} on test questions"
        table = _table(title, "fixed bin", "questions", "pass@1, 95% interval")
        for b in bins:
            table.add_row(str(b["bin"]), str(b["n"]), interval_of(b, "pass@1"))
        return table
    title = f"round {now['round']}, pass@1 on test questions: {before['policy']['name']} before, {name} after"
    table = _table(title, "bin", "n", "before", "after, 95% interval", "gain", "gain since round 0")  # just fits WIDTH
    old = {b["bin"]: b.get("pass@1") for b in before.get("fixed_bins", [])}
    for b in bins:
        gains = difference(b.get("gain_from_last_round")), difference(b.get("gain"))
        table.add_row(str(b["bin"]), str(b["n"]), _number(old.get(b["bin"])), interval_of(b, "pass@1"), *gains)
    return table


def figures(now: dict) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """(title, rows) of each table; a row is (figure, value, models)."""
    policy, search, prm = now["policy"], now.get("search", {}), now.get("prm", {})
    rows = [(key, interval_of(policy, key), policy["name"]) for key in policy if _is_rate(key)]
    for key, gain in now.get("gain", {}).items():
        rows.append((f"gain {key.replace('_', ' ')}", difference(gain), policy["name"]))
    yield "the policy, on test questions", rows
    models = search.get("models", {})
    yield (
        "search, on test questions",
        [(key, interval_of(search, key), made_by(key, models)) for key in search if _is_rate(key)],
    )
    yield (
        "the verifier, on held-out training questions",
        [
            (key, interval_of(prm, key), "base, not fine-tuned" if key.endswith("_base") else prm["model"])
            for key, value in prm.items()
            if key.startswith("auc_within_question") and value is not None
        ],
    )


def _is_rate(key: str) -> bool:
    """Whether `key` names a measured rate, e.g. `pass@64`."""
    return "@" in key and not key.endswith(("_ci", "_tokens"))


RIVALS = ("base", "published")  # of the PRM, by their names in the search stage


def made_by(key: str, models: dict) -> str:
    """The names of the models that a figure of the search stage depends on."""
    rival = [f"{models.get(name, name)} as verifier" for name in RIVALS if key.endswith(f"_{name}_verifier")]
    if key.startswith("compute_optimal"):
        roles = ["policy", "prm", "reviser", "plan", *(["head"] if key.endswith("_head") else [])]
    else:
        roles = ["reviser" if key.startswith("revise") else "policy"]
        if "majority" not in key and "greedy" not in key and not rival:
            roles.append("prm")
    return ", ".join([models[role] for role in roles if role in models] + rival)


def remarks(now: dict) -> Iterator[str]:
    for key, when in (
        ("migration", "since round 0"),
        ("migration_last", "since the last round"),
        ("migration_null", "by chance alone (round 0 drawn twice)"),
    ):
        hardest = now[key][-1] if key in now else []
        if of := sum(hardest):
            left = of - hardest[-1]
            yield f"left fixed bin {len(hardest)} {when}: {left} of {of} ({left / of:.0%})"
    if "distinct_right" in (policy := now.get("policy", {})):
        yield (
            f"diversity: {policy['distinct_right']:.2f} distinct right texts a question, answer entropy"
            f" {policy['answer_entropy']:.2f} nats"
        )
    reviser = now.get("reviser", {})
    part, where = (reviser["test"], "test questions") if "test" in reviser else (reviser, "validation questions")
    for key, label in (
        ("pass@1_by_attempt", "pass@1 by attempt"),
        ("control_by_attempt", "with another question's attempts"),
    ):
        if values := part.get(key):
            rates = " ".join(f"{value:.2f}" for value in values)
            yield f"{reviser['model']} {label}, 1 to {len(values)} ({where}): {rates}"
    for key in ("wrong_to_right", "right_to_wrong"):
        if (share := part.get(key)) is not None and (fresh := part.get(f"{key}_fresh")) is not None:
            yield f"{reviser['model']} {key.replace('_', ' ')}: {share:.3f} of revisions, {fresh:.3f} of fresh attempts"
    if sample := now.get("sample"):
        counts = {"questions": sample["questions"], "solutions": sample["solutions"], **sample["verdicts"]}
        yield "sample: " + ", ".join(f"{count:,} {name}" for name, count in counts.items())
    for part in ("prm", "reviser"):
        if why := now.get(part, {}).get("why"):
            yield f"{part}_{now['round']} is not used: {why}"
    if harvest := now.get("harvest"):
        line = "harvest: {candidates:,} candidates, {kept:,} kept, from {questions:,} questions".format(**harvest)
        share = harvest.get("step_verified")
        yield line if share is None else f"{line}, {share:.1%} of them with all steps right"
    if "gate" in now:
        yield "gate (calibrate questions): " + ", ".join([now["gate"], *_gate(now["gate_figures"])])


def _gate(figures: dict) -> Iterator[str]:
    for key, value in figures.items():
        if key.endswith("gain"):
            yield f"{key.replace('_', ' ')} {difference(value)}"
        elif key.startswith("pass@"):
            yield f"{key} {value[0]:.3f} -> {value[1]:.3f}"
    if why := figures.get("why"):
        yield why


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}"


def _interval(pair: list[float] | None, sign: str = "") -> str:
    return f" [{pair[0]:{sign}.3f}, {pair[1]:{sign}.3f}]" if pair else ""


def interval_of(figures: dict, key: str) -> str:
    return _number(figures.get(key)) + _interval(figures.get(f"{key}_ci"))


def difference(gain: list[float] | None) -> str:
    """Format (gain, low, high)."""
    return _number(gain[0], "+") + _interval(gain[1:], "+") if gain else ""
