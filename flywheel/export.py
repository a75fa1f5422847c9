"""`flywheel export RUN --out DIR`: what a run made, as others' tools load it.

DIR/README.md            model card with the figures
DIR/policy/              merged policy and tokenizer (transformers, vLLM)
DIR/adapters/ROLE/       LoRA adapters policy, prm, reviser (PeftModel, vllm serve --lora-modules)
DIR/harvest/             the verified solutions of all rounds (datasets.load_dataset)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from flywheel.errors import UserError
from flywheel.runs.run import Run

HARVEST_COLUMNS = ("question_id", "question", "solution", "answer", "bin", "round", "votes")


def export(run: Run, out: Path, round: int | None = None) -> Path:
    """Export the models after `round` (default: the last finished one) into `out`.

    `out` must not exist or be empty; it appears whole or not at all. Raises UserError.
    """
    done = run.rounds
    if not done or max(done) == 0:
        raise UserError(f"{run.root}: no round finished beyond the base, nothing to export")
    chosen = max(done) if round is None else round
    if chosen not in done or chosen == 0:
        raise UserError(
            f"{run.root}: round {chosen} cannot be exported; finished: {', '.join(str(r) for r in done if r)}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: not an empty directory; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    try:
        _fill(run, chosen, staging)
        staging.chmod(0o777 & ~_umask())
        staging.replace(out)
    except OSError as error:
        raise UserError(f"{out}: export failed: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fill(run: Run, round: int, out: Path) -> None:
    base = run.recipe.model.base
    adapters = run.adapters(round)
    if run.policy_round(round) and "policy" not in adapters:
        raise UserError(f"{run.path('distill', run.policy_round(round))}: the policy's adapter is missing")
    for role, source in adapters.items():
        _copy_adapter(source, out / "adapters" / role, base)
    _merge(base, adapters.get("policy"), out / "policy")
    rows = _harvest(run, round, out / "harvest")
    (out / "README.md").write_text(_card(run, round, sorted(adapters), rows), encoding="utf-8")


def _merge(base: str, adapter: Path | None, out: Path) -> None:
    """Base plus adapter in one model, in the base's own dtype; the base itself without an adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.base {base!r} cannot be loaded from {Path.cwd()}: {str(error).splitlines()[0]}"
        ) from None
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)


def _copy_adapter(source: Path, target: Path, base: str) -> None:
    """The adapter's weights and config alone, naming the base as the recipe does (no path of this machine)."""
    target.mkdir(parents=True)
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(source / "adapter_model.safetensors", target / "adapter_model.safetensors")


def _harvest(run: Run, round: int, out: Path) -> int:
    """All rounds' harvest up to `round` in one parquet; returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [path for r in range(1, round + 1) if (path := run.harvest(r))]
    tables = [pq.ParquetFile(path).read(columns=list(HARVEST_COLUMNS)) for path in paths]
    tables = [table for table in tables if table.num_rows]
    if not tables:
        return 0
    table = pa.concat_tables(tables, promote_options="permissive")
    out.mkdir()
    pq.write_table(table, out / "train.parquet")
    return table.num_rows


def _card(run: Run, round: int, adapters: list[str], rows: int) -> str:
    from io import StringIO

    import yaml

    from flywheel.report.summary import summary
    from flywheel.report.tables import print_round

    data, recipe = summary(run), run.recipe.model_dump(mode="json")
    text = StringIO()
    print_round(data, round, text)
    now = next(item for item in data["rounds"] if item["round"] == round)
    policies = [item.get("policy") or {} for item in data["rounds"] if item["round"] <= round]
    made = run.policy_round(round)
    progress = ["| round | policy | pass@1 | 95% interval | gate |", "|---|---|---|---|---|"]
    for item, policy in zip(data["rounds"], policies):
        low, high = policy.get("pass@1_ci") or (None, None)
        interval = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
        value = f"{policy['pass@1']:.3f}" if policy.get("pass@1") is not None else ""
        progress.append(
            f"| {item['round']} | {policy.get('name', '')} | {value} | {interval} | {item.get('gate', '')} |"
        )
    lora = "\n".join(f"    {role}=adapters/{role} \\" for role in adapters).rstrip(" \\")
    front = {
        "base_model": recipe["model"]["base"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["flywheel", "lora", "process-reward-model", "test-time-compute"],
    }
    if Path(recipe["model"]["base"]).exists():
        del front["base_model"]  # a local folder is no model of a hub
    origin = (
        f"`policy_{made}`: a LoRA adapter trained from the frozen base on the harvest of rounds 1 to {made}, merged."
        if made
        else "`policy_0`: the base itself. No round's distillation has passed its gate."
    )
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {run.root.resolve().name}: the policy after round {round}",
        f"{origin}\n\nBase model: `{recipe['model']['base']}`. Recipe: `{recipe.get('name')}`, seed {recipe.get('seed', 0)}, "
        f"problems `{recipe['problems']['path']}`. Made by flywheel: each round samples, trains a process reward model and a "
        "reviser on the samples, searches the training questions with them, and distils the verified solutions into the "
        "policy. The adapters `prm` and `reviser` are those of this round's search.",
        "## Test questions\n\n" + "\n".join(progress),
        f"Each figure of round {now['round']} with the models that made it:\n\n```\n"
        + text.getvalue().strip("\n")
        + "\n```",
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("policy")\ntokenizer = AutoTokenizer.from_pretrained("policy")\n```',
        f"The prompt is `{json.dumps(recipe['prompts']['solve'])}`"
        + (" in the chat template." if recipe["prompts"].get("chat") else " as plain text."),
    ]
    if adapters:
        parts.append(
            f"```sh\nvllm serve {recipe['model']['base']} --enable-lora --max-lora-rank {recipe['model'].get('lora_rank', 16)} --lora-modules \\\n{lora}\n```"
        )
    if "prm" in adapters:
        good, bad = (recipe.get("prm") or {}).get("labels", ("+", "-"))
        parts.append(
            f"The PRM's value of a step is the probability of `{good}` against `{bad}` as the next token after it."
        )
    if rows:
        parts.append(
            f'## Harvest\n\n{rows:,} verified solutions of training questions: `datasets.load_dataset("harvest")`. `bin` is the '
            "question's fixed difficulty bin (1 easiest) when harvested, `votes` how many independent candidates gave the same solution."
        )
    else:
        parts.append("## Harvest\n\nNo solution was verified in any round.")
    spent = data["ledger"]
    parts.append(
        "## Cost\n\n"
        + "\n".join(f"- {role}: {n:,} tokens" for role, n in spent["tokens"].items())
        + f"\n- {spent['flops']:.3g} FLOPs (2N a token, 6N in training), {data['wall_seconds']:,.0f} s of stages (whole run, {data['finished_rounds']} rounds)"
    )
    parts.append(
        "## Recipe\n\n```yaml\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip() + "\n```"
    )
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flywheel export", description="Write a run's models, its harvest and a model card to a directory."
    )
    parser.add_argument("run", type=Path, help="a run directory, e.g. runs/chain")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty directory")
    parser.add_argument("--round", type=int, help="the models after this round (default: the last finished one)")
    args = parser.parse_args(argv)
    try:
        print(f"exported to {export(Run(args.run), args.out, args.round)}")
    except UserError as error:
        print(f"flywheel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
