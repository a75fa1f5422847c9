"""The figures of a run as tables of at most 100 columns."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TextIO


def print_all(data: dict, file: TextIO | None = None) -> None:
    """Everything in a `summary`, for people."""
    console = _console(file)
    console.print(f"recipe {data['recipe']}, {data['finished_rounds']} rounds finished after the base")
    for item in data["rounds"]:
        print_round(data, item["round"], file)
    for item in data.get("unfinished", []):
        console.print(f"round {item['round']} under way: {', '.join(item['finished_stages'])} done")
    ledger = data["ledger"]
    table = _table("ledger", "role", "tokens", "of these cached", "FLOPs")
    for role, tokens in ledger["tokens"].items():
        flops = ledger["flops_by_role"].get(role, 0.0)
        table.add_row(role, f"{tokens:,}", f"{ledger['tokens_cached'].get(role, 0):,}", f"{flops:.3g}")
    table.add_row(
        "all",
        f"{sum(ledger['tokens'].values()):,}",
        f"{sum(ledger['tokens_cached'].values()):,}",
        f"{ledger['flops']:.3g}",
    )
    console.print(table)
    table = _table("by stage", "stage", "tokens", "seconds")
    for stage, seconds in ledger["seconds"].items():
        table.add_row(stage, f"{ledger['tokens_by_stage'].get(stage, 0):,}", f"{seconds:,.1f}")
    table.add_row("all", f"{sum(ledger['tokens_by_stage'].values()):,}", f"{data['wall_seconds']:,.1f}")
    console.print(table)


def print_round(data: dict, round: int, file: TextIO | None = None) -> None:
    """One round of a `summary`: the fixed bins, then every figure with interval and models."""
    rounds = {item["round"]: item for item in data["rounds"]}
    if round not in rounds:
        raise ValueError(f"round {round} is not finished")
    now, before = rounds[round], rounds.get(round - 1)
    console = _console(file)
    console.print(_bins(now, before))
    for title, rows in _figures(now):
        table = _table(f"round {round}: {title}", "figure", "value, 95% interval", "by")
        for row in rows:
            table.add_row(*row)
        if rows:
            console.print(table)
    for line in _remarks(now):
        console.print(line)


def _console(file: TextIO | None):
    from rich.console import Console

    file = file or sys.stdout
    narrow = Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=False)
    return (
        narrow
        if file.isatty() and narrow.width <= 100
        else Console(file=file, width=100, highlight=False, markup=False, emoji=False)
    )


def _table(title: str, *columns: str):
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, title_style="bold")
    for i, column in enumerate(columns):
        text = i == 0 or column == "by"
        # figures never break; names may
        table.add_column(
            column, justify="left" if text or "interval" in column else "right", overflow="fold", no_wrap=not text
        )
    return table


def _bins(now: dict, before: dict | None):
    name = (now.get("policy") or {}).get("name", f"policy after round {now['round']}")
    if before is None:
        table = _table(
            f"round {now['round']}: {name} on test questions", "fixed bin", "questions", "pass@1, 95% interval"
        )
        for b in now.get("fixed_bins", []):
            table.add_row(str(b["bin"]), str(b.get("n", "")), _value(b, "pass@1"))
        return table
    old_name = (before.get("policy") or {}).get("name", "the last policy")
    title = f"round {now['round']}, pass@1 on test questions: {old_name} before, {name} after"
    table = _table(title, "bin", "n", "before", "after, 95% interval", "gain", "gain since round 0")  # in 100 columns
    old = {b["bin"]: b for b in before.get("fixed_bins", [])}
    for b in now.get("fixed_bins", []):
        was, new = old.get(b["bin"], {}).get("pass@1"), b.get("pass@1")
        gain = _gain(b.get("gain_from_last_round")) or (
            _number(new - was, "+") if was is not None and new is not None else ""
        )
        table.add_row(str(b["bin"]), str(b.get("n", "")), _number(was), _value(b, "pass@1"), gain, _gain(b.get("gain")))
    return table


def _figures(now: dict) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Tables (title, rows of figure, value, models)."""
    policy, search, prm = now.get("policy") or {}, now.get("search") or {}, now.get("prm") or {}
    name, models = policy.get("name", ""), search.get("models") or {}
    tested = [(key, _value(policy, key), name) for key, _ in _numbers(policy) if key not in ("n", "samples")]
    for key, gain in (now.get("gain") or {}).items():
        words = key.replace("_", " ") if key.startswith("from_") else f"in {key} from last round"
        tested.append((f"gain {words}", _gain(gain), name))
    searched = [
        (key, _value(search, key), made_by(key, models)) for key, _ in _numbers(search) if not key.endswith("_tokens")
    ]
    by = prm.get("model") or models.get("prm") or f"prm_{now['round']}"
    verified = [
        (key + where, _value(part, key), "base, not fine-tuned" if key.endswith("_base") else by)
        for where, part in (("", prm), (", test", prm.get("test") or {}))
        for key, _ in _numbers(part)
        if key.startswith("auc_within_question")
    ]
    return [
        ("the policy, on test questions", tested),
        ("search, on test questions", searched),
        ("the verifier, on held-out training questions", verified),
    ]


def made_by(key: str, models: dict) -> str:
    """The models behind one search figure; a majority needs no verifier."""
    roles = ["reviser" if key.startswith("revise") else "policy"]
    if key.startswith("compute_optimal"):
        roles = ["policy", "prm", "reviser", "plan"]
    elif "majority" not in key and not key.endswith("base_verifier"):
        roles.append("prm")
    names = [str(models[role]) for role in roles if models.get(role)]
    return ", ".join(names + ["base as verifier"] * key.endswith("base_verifier"))


def left_hardest(matrix: list[list[float]]) -> tuple[int, int]:
    """(questions of the last row's bin that left it, questions that were in it)."""
    last = matrix[-1]
    return round(sum(last) - last[-1]), round(sum(last))


def _remarks(now: dict) -> Iterator[str]:
    for key, since in (
        ("migration", "round 0"),
        ("migration_last", "the last round"),
        ("migration_null", "round 0, by re-sampling round 0 alone"),
    ):
        if now.get(key) and (count := left_hardest(now[key]))[1]:
            yield f"left fixed bin {len(now[key])} since {since}: {count[0]} of {count[1]} ({count[0] / count[1]:.0%})"
    reviser = now.get("reviser") or {}
    part, where = (reviser["test"], "test questions") if reviser.get("test") else (reviser, "validation questions")
    for key, label in (
        ("pass@1_by_attempt", "pass@1 by attempt"),
        ("control_by_attempt", "with another question's attempts"),
    ):
        if values := part.get(key):
            name = reviser.get("model") or f"reviser_{now['round']}"
            yield f"{name} {label}, 1 to {len(values)} ({where}): " + " ".join(f"{value:.2f}" for value in values)
    if sample := now.get("sample"):
        verdicts = sample.get("verdicts") or {k: sample[k] for k in ("truncated", "unparsable") if k in sample}
        parts = [f"{sample[key]:,} {key}" for key in ("questions", "solutions") if key in sample]
        yield "sample: " + ", ".join(parts + [f"{count:,} {verdict}" for verdict, count in verdicts.items()])
    for part in ("prm", "reviser"):
        if why := (now.get(part) or {}).get("why"):
            yield f"{part}_{now['round']} is not used: {why}"
    if harvest := now.get("harvest"):
        words = {
            "candidates": "{:,} candidates",
            "kept": "{:,} kept",
            "questions": "from {:,} questions",
            "step_verified": "{:.1%} of them with all steps right",
        }
        parts = [text.format(harvest[key]) for key, text in words.items() if harvest.get(key) is not None]
        yield "harvest: " + ", ".join(parts)
    if "gate" in now:
        gate = now.get("gate_figures", {})
        parts = [now["gate"]]
        for key, value in gate.items():
            if key.startswith("pass@") and isinstance(value, list) and len(value) == 2:
                parts.append(f"{key} {value[0]:.3f} -> {value[1]:.3f}")
            elif key.endswith("gain") and isinstance(value, list) and len(value) == 3:
                parts.append(f"{key.replace('_', ' ')} {_gain(value)}")
        if gate.get("why"):
            parts.append(gate["why"])
        yield "gate (calibrate questions): " + ", ".join(parts)


def _numbers(figures: dict) -> Iterator[tuple[str, float]]:
    for key, value in figures.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}"


def _interval(pair, sign: str = "") -> str:
    return f" [{pair[0]:{sign}.3f}, {pair[1]:{sign}.3f}]" if pair and None not in pair else ""


def _value(figures: dict, key: str) -> str:
    return _number(figures.get(key)) + _interval(figures.get(f"{key}_ci"))


def _gain(triple: list[float] | None) -> str:
    """(gain, low, high)."""
    return _number(triple[0], "+") + _interval(triple[1:], "+") if triple else ""
