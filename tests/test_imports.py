"""Imports point down, by package: read from the source."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted((ROOT / "flywheel").rglob("*.py"))
}
HEAVY = {"torch", "vllm", "transformers", "trl", "peft", "datasets", "wandb", "matplotlib", "deepspeed", "accelerate"}
# Each package has a rank of its own, the highest first; an import may point down, or stay inside its package.
COMMANDS = {"__main__", "iterate", "tryout", "verify", "export", "gguf", "push", "summary", "solve", "serve", "page"}
NOUNS = {"records", "recipe", "ledger", "errors"}
RANKS = [
    COMMANDS,
    {"report", "serving"},
    {"stages"},
    {"training"},
    {"search"},
    {"models"},
    {"runs"},
    {"problems"},
    {"measure"},
    NOUNS,
]


def imported(path: Path, module: str, top_only: bool = False) -> set[str]:
    """Absolute names imported in a file; with `top_only` those that importing it runs."""
    found = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if top_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue  # a name for annotations is no dependency
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                    parts = package.split(".")
                    base = ".".join(parts[: len(parts) - child.level + 1] + ([base] if base else []))
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    found.add(full if full in MODULES else base)
            walk(child)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return found


def rank(module: str) -> int:
    part = module.split(".")[1]
    return next(i for i, parts in enumerate(RANKS) if part in parts)


def test_the_checks_see_imports():
    """The reader of imports finds the kinds that it is to forbid."""
    assert "flywheel.records" in imported(ROOT / "flywheel/runs/run.py", "flywheel.runs.run", top_only=True)
    assert "flywheel.problems.sources" in imported(ROOT / "flywheel/runs/run.py", "flywheel.runs.run")
    assert "flywheel.problems.sources" not in imported(
        ROOT / "flywheel/runs/run.py", "flywheel.runs.run", top_only=True
    )
    assert "flywheel.runs.manifest" in imported(ROOT / "flywheel/runs/run.py", "flywheel.runs.run")


@pytest.mark.parametrize("module", [m for m in MODULES if m != "flywheel"])
def test_imports_point_down(module):
    for name in imported(MODULES[module], module):
        if name.startswith("flywheel."):
            assert rank(name) >= rank(module), f"{module} imports {name}, which is above it"


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imported(path, module) & MODULES.keys() - {module} for module, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


@pytest.mark.parametrize("module", MODULES)
def test_flywheel_stands_alone(module):
    for name in imported(MODULES[module], module):
        assert name.split(".")[0] not in {"recipes", "data", "eval", "tests"}, f"{module} imports {name}"


def test_vllm_is_imported_in_its_engine_only():
    users = {
        module for module, path in MODULES.items() if any(n.split(".")[0] == "vllm" for n in imported(path, module))
    }
    assert users == {"flywheel.models.vllm", "flywheel.models.vllm_cpu"}


SHARED = {"flywheel.stages.kit", "flywheel.stages.shared", "flywheel.stages.tryout"}


def test_no_stage_imports_another():
    for module, path in MODULES.items():
        if module.startswith("flywheel.stages.") and module not in SHARED:
            others = {n for n in imported(path, module) if n.startswith("flywheel.stages.") and n not in SHARED}
            assert not others, f"{module} imports {others}"


def test_search_never_sees_a_gold_answer():
    for module, path in MODULES.items():
        if module.startswith("flywheel.search"):
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            taken = {
                alias.name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            assert not {"Problem", "Grade", "Grader"} & (names | taken), f"{module} knows gold answers"
            assert not {n for n in imported(path, module) if n in ("flywheel.problems.sources", "flywheel.runs.run")}, (
                f"{module} could read problems"
            )


def reached(start: str) -> set[str]:
    """All modules that importing `start` imports, flywheel's own followed."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            todo += imported(MODULES[name], name, top_only=True)
            todo += [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)]
    return seen


@pytest.mark.parametrize(
    "start",
    [
        "iterate",
        "runs.loop",
        "recipe",
        "runs.run",
        "records",
        "search",
        "stages.kit",
        "report.tables",
        "problems.sources",
        "training",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(start):
    heavy = {n for n in reached(f"flywheel.{start}") if n.split(".")[0] in HEAVY}
    assert not heavy, f"importing flywheel.{start} imports {heavy}"


def test_the_rank_process_really_loads_no_torch():
    """What the source says, seen: the loop and all stages are imported, and torch is not there."""
    loaded = f"sorted(set(sys.modules) & set({HEAVY!r}))"
    code = f"import sys, flywheel.runs.loop, flywheel.stages; flywheel.stages.stages(1); print({loaded})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr
