"""Export a run's models and harvest for use with other tools: `flywheel export RUN --out DIR`

DIR/README.md            model card with the figures
DIR/policy/              merged policy and tokenizer (transformers, vLLM)
DIR/adapters/ROLE/       LoRA adapters policy, prm, reviser, head (PeftModel, vllm serve --lora-modules)
DIR/harvest/             the verified solutions of all rounds (datasets.load_dataset)
DIR/recipe.yaml, system.json  what flywheel solve DIR and flywheel serve DIR need beside the adapters
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flywheel.errors import UserError, first_line, one_line
from flywheel.records import Role
from flywheel.runs.hub import name_of

if TYPE_CHECKING:
    from flywheel.recipe import SampleSpec
    from flywheel.runs.run import Run

HARVEST_COLUMNS = ("question_id", "question", "solution", "answer", "bin", "round", "votes")


def export(run: Run, out: Path, round: int | None = None) -> Path:
    """Export the models after `round` (default: the last finished one) into `out`.

    `out` must be empty or not exist; it is written atomically. Raises UserError.
    """
    done = [r for r in run.rounds if r]
    if not done:
        raise UserError(f"{run.root}: no round finished beyond the base, nothing to export")
    chosen = max(done) if round is None else round
    if chosen not in done:
        raise UserError(f"{run.root}: round {chosen} cannot be exported; finished: {', '.join(map(str, done))}")
    from flywheel.runs.files import new_directory  # imported late to keep --help fast

    with new_directory(out) as staging:
        _fill(run, chosen, staging)
    return out


def _fill(run: Run, round: int, out: Path) -> None:
    adapters = run.adapters(round)
    if (made := run.policy_round(round)) and Role.POLICY not in adapters:
        raise UserError(f"{run.path('distill', made)}: the policy's adapter is missing")
    from flywheel.serving import system  # imported late to keep --help fast

    served, base = system.system(run, round), run.recipe.model.base
    for role, source in adapters.items():
        _copy_adapter(source, out / "adapters" / role, name_of(base))
    _merge(base, adapters.get(Role.POLICY), run.recipe.sample, out / "policy")
    rows = _harvest(run, round, out / "harvest")
    from flywheel.report.card import card

    shutil.copyfile(run.root / "recipe.yaml", out / "recipe.yaml")
    (out / system.EXPORTED).write_text(json.dumps(system.to_dict(served), indent=1) + "\n")
    (out / "README.md").write_text(card(run, round, adapters, rows), encoding="utf-8")


def _merge(base: str, adapter: Path | None, sample: SampleSpec, out: Path) -> None:
    """Write the base with the adapter (if any) merged in, in the base's dtype, and the tokenizer.

    Its generation_config.json samples as `sample` says, so that transformers and `vllm serve` do as the figures' runs.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flywheel.models.weights import drop_sampling_defaults

    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise UserError(f"model.base {base!r} cannot be loaded from {Path.cwd()}: {first_line(error)}") from None
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    drop_sampling_defaults(model)
    model.generation_config.update(
        do_sample=True,
        temperature=sample.temperature,
        top_p=sample.top_p,
        top_k=sample.top_k,  # transformers' own default is 50
        min_p=sample.min_p or None,
        repetition_penalty=sample.repetition_penalty,
        max_new_tokens=sample.max_tokens,
        max_length=None,
    )
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)


def _copy_adapter(source: Path, target: Path, base: str) -> None:
    """Copy only weights and config; the config's base becomes `base`, as the recipe names it."""
    target.mkdir(parents=True)
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(source / "adapter_model.safetensors", target / "adapter_model.safetensors")


def _harvest(run: Run, round: int, out: Path) -> int:
    """Write the harvests of all rounds up to `round` to one parquet file; returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [path for r in range(1, round + 1) if (path := run.harvest(r))]
    tables = [pq.ParquetFile(path).read(columns=list(HARVEST_COLUMNS)) for path in paths]
    tables = [table for table in tables if table.num_rows]  # an empty table has no column types
    if not tables:
        return 0
    out.mkdir()
    pq.write_table(pa.concat_tables(tables, promote_options="permissive"), out / "train.parquet")
    return sum(table.num_rows for table in tables)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flywheel export", description="Write a run's models, its harvest and a model card to a directory."
    )
    parser.add_argument("run", type=Path, help="a run directory, e.g. runs/chain")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty directory")
    parser.add_argument("--round", type=int, help="the models after this round (default: the last finished one)")
    args = parser.parse_args(argv)

    def work() -> str:
        from flywheel.runs.run import Run  # imported late to keep --help fast

        return f"exported to {export(Run(args.run), args.out, args.round)}"

    return one_line(work)


if __name__ == "__main__":
    sys.exit(main())
