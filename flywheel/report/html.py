"""A run as one HTML page without outside assets: its rounds, pictures, cost, and a browser of its questions.

Everything is read from the run's files, so the page can be made while the run goes on.
"""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flywheel.measure.bins import fixed_bin
from flywheel.problems import gym
from flywheel.records import Harvested, Problem, Split, StepValues
from flywheel.report import pictures
from flywheel.report.summary import summary
from flywheel.report.tables import difference, figures, interval_of, remarks
from flywheel.runs.files import stream_table
from flywheel.runs.run import Run
from flywheel.stages.shared import judged, rate, spaced, tallies, trace

SHOWN = 4  # distinct solutions of a question and round
TEMPLATE = "page.html.jinja"


@dataclass
class Shown:
    """A distinct solution: its steps as (text, value or None), how often it was drawn, and what became of it."""

    steps: list[tuple[str, float | None]]
    answer: str | None
    verdict: str
    count: int = 0
    harvested: bool = False


@dataclass
class Asked:
    """A question in the browser. `rounds`: round -> (pass rate, fixed bin, its most frequent solutions)."""

    id: str
    text: str
    gold: str
    split: str
    level: str
    rounds: dict[int, tuple[float, int, list[Shown]]] = field(default_factory=dict)


def page(run: Run, questions: int = 200) -> str:
    """The page's HTML, with the first `questions` test questions, and as many training questions with step values."""
    from jinja2 import Environment, FileSystemLoader

    data = summary(run)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template(TEMPLATE).render(
        name=run.recipe.name,
        base=Path(run.recipe.model.base).name,
        data=data,
        interval_of=interval_of,
        difference=difference,
        figures=figures,
        remarks=remarks,
        pictures=list(drawn(run)),
        questions=[*tested(run, questions), *trained(run, questions)],
    )


def drawn(run: Run) -> Iterator[tuple[str, str]]:
    """(name, data URI) of every picture."""
    for name, figure in pictures.figures(run):
        png = io.BytesIO()
        figure.savefig(png, dpi=110, bbox_inches="tight")
        yield name.replace("_", " "), "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def tested(run: Run, count: int) -> list[Asked]:
    """The first `count` test questions with the policy's samples in each evaluated round."""
    problems = run.problems(Split.TEST)[:count]
    rounds = sorted(r for r, stage in run.manifests if stage == "evaluate")
    return browse(run, problems, [(r, "evaluate", "evaluate", {}, set()) for r in rounds])


def trained(run: Run, count: int) -> list[Asked]:
    """The first `count` training questions whose solutions got step values, with what was harvested of them."""
    rounds = sorted(r for r, stage in run.manifests if stage == "label")
    tables = [table for r in rounds for table in run.written("label", r).tables(StepValues, ["question_id"])]
    labelled = {question for table in tables for question in table["question_id"].to_pylist()}
    problems = [p for p in run.problems(Split.TRAIN) if p.id in labelled][:count]
    shown, looks = {p.id for p in problems}, []
    for r in rounds:
        values = {row.solution_id: row.values for row in run.read(StepValues, "label", r) if row.question_id in shown}
        rows = stream_table(path, Harvested) if (path := run.harvest(r)) else ()
        kept = {(row.question_id, spaced(row.solution)) for row in rows if row.question_id in shown}
        looks.append((r, "sample", "sample", values, kept))
    return browse(run, problems, looks)


def browse(run: Run, problems: Iterable[Problem], looks: list[tuple]) -> list[Asked]:
    """The questions with their most frequent solutions, those with step values first.

    looks: (round, stage, purpose of its solutions, step values by solution id, harvested (question id, text)).
    """
    gold = gym.plain if run.recipe.problems.format == "reasoning_gym" else str
    out = {p.id: Asked(p.id, p.question.text, gold(p.answer), str(p.split), p.level) for p in problems}
    for r, stage, purpose, values, kept in looks:
        rates = {q: rate(verdicts) for q, verdicts in tallies(run, stage, r, purpose, out)}
        groups: dict[str, dict[str, Shown]] = defaultdict(dict)
        for s, verdict in (pair for _, group in judged(run, stage, r, purpose, out) for pair in group):
            text = trace(s)
            shown = groups[s.question_id].setdefault(text, Shown([], s.answer, str(verdict)))
            if s.id in values or not shown.steps:
                known = [*values.get(s.id, ()), *[None] * len(s.steps)]
                shown.steps = [(step.text, worth) for step, worth in zip(s.steps, known)] or [("", None)]
            shown.count += 1
            shown.harvested = (s.question_id, text) in kept
        for id, found in groups.items():
            ranked = sorted(found.values(), key=lambda one: (one.steps[0][1] is None, -one.count))
            out[id].rounds[r] = rates[id], fixed_bin(rates[id], run.recipe.calibrate.edges), ranked[:SHOWN]
    return list(out.values())
