"""The model card of an export: contents, origin, figures, cost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

import yaml

from flywheel.recipe import Recipe
from flywheel.records import Role
from flywheel.report.summary import summary
from flywheel.report.tables import print_round
from flywheel.runs.hub import name_of
from flywheel.runs.manifest import public
from flywheel.runs.run import Run

ABOUT = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["flywheel", "lora", "process-reward-model", "test-time-compute"],
}


def card(run: Run, round: int, adapters: Iterable[Role], solutions: int) -> str:
    """The model card (Markdown with YAML front matter) of the models after `round`.

    `adapters`: roles whose adapters are exported. `solutions`: number of solutions in the exported harvest.
    """
    recipe, data, made = run.recipe, summary(run), run.policy_round(round)
    base, spent = name_of(recipe.model.base), data["ledger"]
    front = ABOUT if Path(base).exists() else {"base_model": base, **ABOUT}  # `base_model` must be a name on the Hub
    if made:
        origin = f"a LoRA adapter on the frozen base, trained on the harvests of rounds 1 to {made}, merged"
    else:
        origin = "the base itself. No round's distillation has passed its gate"
    tables = StringIO()
    print_round(data, round, tables)
    figures = "\n".join(line.rstrip() for line in tables.getvalue().splitlines())
    cost = "\n".join(f"- {role}: {tokens:,} tokens" for role, tokens in spent["tokens"].items())
    return f"""---
{_yaml(front)}
---

# {run.root.resolve().name}: the policy after round {round}

`policy_{made}`: {origin}.

Base model: `{base}`. Recipe: `{recipe.name}`, seed {recipe.seed}, problems `{recipe.problems.path}`.
Made by flywheel: each round samples, trains a process reward model and a reviser on the samples, searches the
training questions with them, and distils the verified solutions into the policy. The adapters `prm` and `reviser`
are those of this round's search; `head`, if there, names how difficult a question is.

## Test questions

{_progress(data["rounds"][: round + 1])}

Each figure of round {round} with the models that made it:

```
{figures}
```

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("policy")
tokenizer = AutoTokenizer.from_pretrained("policy")
```

The prompt is `{json.dumps(recipe.prompts.solve)}` {"in the chat template" if recipe.prompts.chat else "as plain text"}.
{_sampling(recipe)}
{_serving(run, sorted(adapters))}
## Harvest

{_harvest(solutions)}

## Cost

{cost}
- {spent["flops"]:.3g} FLOPs (2N a token, 4N + 2T in training with T trained parameters, and attention),
  {data["wall_seconds"]:,.0f} s of stages (whole run, {data["finished_rounds"]} rounds)

## Recipe

```yaml
{_yaml(public(recipe))}
```
"""


def _yaml(value: dict) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip()


def _progress(rounds: list[dict]) -> str:
    lines = ["| round | policy | pass@1 | 95% interval | gate |", "|---|---|---|---|---|"]
    for item in rounds:
        name, rate, (low, high) = (item["policy"][key] for key in ("name", "pass@1", "pass@1_ci"))
        lines.append(f"| {item['round']} | {name} | {rate:.3f} | {low:.3f} to {high:.3f} | {item.get('gate', '')} |")
    return "\n".join(lines)


def _sampling(recipe: Recipe) -> str:
    sample, stop = recipe.sample, recipe.prompts.stop
    keys = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "max_steps")
    chosen = ", ".join(f"{key} {getattr(sample, key):g}" for key in keys)
    ends = f", ended by EOS or by {', '.join(f'`{json.dumps(text)}`' for text in stop)}" if stop else ", ended by EOS"
    system = f" The system message is `{json.dumps(recipe.prompts.system)}`." if recipe.prompts.system else ""
    return (
        f"All figures were measured on samples with {chosen}{ends}.{system} `policy/generation_config.json` samples so."
    )


def _serving(run: Run, adapters: list[Role]) -> str:
    if not adapters:
        return ""
    rank = max(8, 1 << (run.recipe.model.lora_rank - 1).bit_length())  # vLLM accepts powers of two from 8
    modules = " \\\n".join(f"    {role}=adapters/{role}" for role in adapters)
    serve = f"vllm serve {name_of(run.recipe.model.base)} --enable-lora --max-lora-rank {rank} --lora-modules"
    good, bad = run.recipe.prm.labels
    value = f"\nThe PRM's value of a step is the probability of `{good}` against `{bad}` as the next token after it.\n"
    return f"\n```sh\n{serve} \\\n{modules}\n```\n{value if Role.PRM in adapters else ''}"


def _harvest(solutions: int) -> str:
    if not solutions:
        return "No solution was verified in any round."
    return f"""{solutions:,} verified solutions of training questions: `datasets.load_dataset("harvest")`. `bin` is the
question's fixed difficulty bin (1 easiest) when harvested, `votes` how many independent candidates gave the same
solution."""
