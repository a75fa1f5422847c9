"""Do the paper's claims hold? One row a claim, from the draws of `python -m eval study`.

Snell et al. 2024: what the paper has, what these runs (seeds) have with the 95% interval, and whether it holds. Writes
claims.json, figures.json, CLAIMS.md and pictures into eval/results/ (of other --budgets than the usual ones into a
folder of their own). A figure is the mean of the runs' own, and its interval a bootstrap over questions and runs; a run
counts with the most questions that were drawn of it. A plan is always chosen on one half of the questions and scored on
the other. `--from-results` only takes in what other studies have printed since, and writes CLAIMS.md again.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from eval import pictures
from eval.claims import other_studies
from eval.claims.figures import Figures, of_run
from eval.claims.markdown import markdown
from eval.claims.results import Claim, combine, spread
from eval.claims.rounds import Rounds
from eval.claims.rows import round_rows, study_rows
from eval.claims.study import Study
from eval.draws import BUDGETS, add_sizes, check_sizes, largest, read_all
from flywheel.errors import UserError
from flywheel.runs.files import plain, read_json, write_file, write_json

RESULTS = Path("eval/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser, count="*")
    parser.add_argument("--from-results", action="store_true", help="write CLAIMS.md from what lies in eval/results/")


def draw_command(args: argparse.Namespace, asked: argparse.Namespace, run: str) -> str:
    """The command that samples the study data of one run."""
    words = [word for word in args.command.split()[4:] if word not in {str(other.root) for other in args.runs}]
    size = [] if asked.questions == args.questions else ["--questions", str(asked.questions)]
    return " ".join(["python -m eval study", run, *words, *size])


def of_runs(args: argparse.Namespace) -> tuple[list[Claim], list[Figures]]:
    """(all claims over all runs, the tables of each run)."""
    check_sizes(args)
    asked = [(run, largest(run, args)) for run in args.runs]
    command = " && ".join([*(draw_command(args, one, str(run.root)) for run, one in asked), args.command])
    studies = [Study(*read_all(run, one), seed=run.recipe.seed) for run, one in asked]
    every = sorted({question for study in studies for question in study.questions})
    claims = combine([spread(study_rows(study), study.questions, every) for study in studies], command)
    last = min(max(run.rounds) for run in args.runs)
    claims += combine([round_rows(Rounds(run, last)) for run in args.runs], command)
    figures = [of_run(run, study, args.round) for run, study in zip(args.runs, studies)]
    return claims, [plain(of_one) for of_one in figures]


def measure(args: argparse.Namespace) -> dict:
    is_usual = args.budgets == list(BUDGETS)
    results = RESULTS if is_usual else RESULTS / f"budgets_{'_'.join(map(str, args.budgets))}"
    if args.from_results:
        found = read_json(results / "claims.json"), read_json(results / "figures.json")
        if None in found:
            raise UserError(f"{results}: no claims.json and figures.json; python -m eval claims RUN writes them")
        claims, figures = [Claim(**row) for row in found[0]], found[1]
        claims = [claim for claim in claims if "python -m eval claims" in claim.command]  # the others are read anew
    else:
        if not args.runs:
            raise UserError("which runs? name their directories, or say --from-results")
        claims, figures = of_runs(args)
        if (matched := read_json(results / "flops_matched.json")) is not None:
            figures[0]["flops_matched"] = matched
        results.mkdir(parents=True, exist_ok=True)
        write_json(results / "figures.json", figures)
        pictures.draw(figures[0], results)
    claims += other_studies.kept(RESULTS) if is_usual else []
    write_json(results / "claims.json", [asdict(claim) for claim in claims])
    write_file(results / "CLAIMS.md", markdown(claims, figures).encode())
    return {"written": str(results / "CLAIMS.md"), "claims": len(claims)}
