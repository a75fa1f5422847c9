"""What is installed is `flywheel` alone, and it works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "pydantic", "vllm", "transformers", "pyarrow"}
MICRO = ["problems.limits={train: 8, calibrate: 8, validation: 4, test: 8}", "track.mode=disabled"]
MICRO += ["evaluate={samples: 4, budget: 4, probe: 2, bootstrap: 100}", "calibrate.budgets=[4]", "harvest.budget=4"]


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})


def ok(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this checkout, built from a copy: a build leaves files beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("flywheel", "recipes", "accelerate_configs", "data", "eval", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ("--no-deps", "--no-build-isolation", "--no-index")
    ok(run(sys.executable, "-m", "pip", "wheel", ".", *build, "-w", out, cwd=source))
    return next(out.glob("flywheel-*.whl"))


def test_the_wheel_holds_flywheel_and_what_a_run_needs_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "flywheel").rglob("*.py")}
    data = ["data/__init__.py", "data/chain/__init__.py", "data/chain/domain.py"]
    patterns = ("recipes/*.yaml", "recipes/gpu/*.yaml", "accelerate_configs/*.yaml", "data/chain/problems/*.jsonl")
    patterns += ("data/chain/seed_model/*.json", "data/chain/seed_model/*.safetensors")
    data += [str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)]
    assert len(data) >= 3 + 3 + 8 + 4 + 5
    assert names == modules | {"flywheel/py.typed", "flywheel/report/page.html.jinja"} | {
        f"flywheel/share/{name}" for name in data
    }


@pytest.mark.parametrize("command", ["", "iterate", "summary", "verify", "export", "push", "gguf", "config"])
def test_help_is_answered_without_anything_heavy(command, tmp_path):
    words = [word for word in (command, "--help") if word]
    done = run(sys.executable, "-X", "importtime", "-m", "flywheel", *words, cwd=ROOT)
    assert f"usage: flywheel {command}".strip() in ok(done)
    assert not HEAVY & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_a_torch_that_does_not_load_is_replaced_by_the_cpu_build(tmp_path):
    """`make setup` with programs that only write down how they are called."""
    log, stub = tmp_path / "log", tmp_path / "python"
    stub.write_text(
        f"""#!/bin/sh
name=$(basename "$0")
echo "$name $*" >> {log}
case "$name $*" in
  "python -m venv "*) mkdir -p "$3/bin"; for n in python pip uv; do cp "$0" "$3/bin/$n"; done ;;
  "python -c import torch") grep -q "^uv " {log} ;;
esac
"""
    )
    stub.chmod(0o755)
    printed = ok(run("make", "setup", f"PYTHON={stub}", f"VENV={tmp_path / 'venv'}", cwd=ROOT))
    assert len([line for line in printed.splitlines() if "torch does not load" in line]) == 1
    calls = log.read_text().splitlines()
    uv = next(i for i, call in enumerate(calls) if call.startswith("uv "))
    assert calls[uv - 1].startswith("pip ") and " uv==" in calls[uv - 1]
    assert "--torch-backend cpu" in calls[uv] and "--reinstall" in calls[uv] and calls[uv].endswith(" torch==2.13.0")
    assert calls[uv + 1] == "python -c import torch" and calls[uv + 2].endswith("-e .")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment that has the wheel, and this environment's packages without flywheel."""
    venv = tmp_path_factory.mktemp("venv")
    ok(run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv))
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    # a .pth file adds the folder to the path, but does not read the .pth files in it: an editable flywheel stays out
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index")
    ok(run(*pip, "--ignore-installed", wheel, cwd=venv))
    return venv / "bin"


def test_a_shipped_recipe_finds_its_own_functions_beside_somebody_elses_package_data(installed, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").touch()
    code = """
from flywheel.iterate import load_recipe, parser
from flywheel.problems.grading import load_function
print(load_function(load_recipe(parser().parse_args([])).problems.step_checker).__code__.co_filename)
"""
    found = Path(ok(run(installed / "python", "-c", code, cwd=tmp_path)).strip())
    assert found.is_relative_to(installed.parent) and found.parts[-5:-2] == ("flywheel", "share", "data")


@pytest.mark.slow
def test_the_installed_wheel_makes_a_round_in_an_empty_directory(installed, tmp_path):
    launch = (installed / "python", "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet")
    config = ok(run(installed / "flywheel", "config", "cpu", cwd=tmp_path)).strip()
    micro = ("-m", "flywheel.iterate", "--round", 0, "--set", *MICRO)

    assert "chain" in ok(run(installed / "flywheel", "iterate", "--dry-run", cwd=tmp_path))
    assert not (tmp_path / "runs").exists()
    assert "is at the end of round 0" in ok(run(*launch, "--config_file", config, *micro, cwd=tmp_path))
    assert str(installed.parent) in (tmp_path / "runs" / "chain" / "recipe.yaml").read_text()
    assert "pass@1" in ok(run(installed / "flywheel", "summary", "runs/chain", cwd=tmp_path))
    assert "whole: nothing to redo" in ok(run(installed / "flywheel", "verify", "runs/chain", cwd=tmp_path))
    refused = run(installed / "flywheel", "export", "runs/chain", "--out", "out", cwd=tmp_path)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "no round finished beyond the base" in refused.stderr
