"""Build the problem set: ``python -m data.chain.problems`` writes problems/{train,calibrate,validation,test}.jsonl.

A row is {"id", "question", "answer", "split", "k"}.  No question text occurs twice, in whatever split.
k runs 1, 2, ..., 16, 1, 2, ... down each file, so the first n rows are balanced over k for every n.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from .domain import LAB_SEED, MAX_K, answer_of, make_question

SIZES = {"train": 1200, "calibrate": 304, "validation": 208, "test": 512}
FOLDER = Path(__file__).parent / "problems"


def build(seed: int = LAB_SEED) -> dict[str, list[dict]]:
    """Split -> rows.  The test split is drawn first: changing another's size leaves it as it is."""
    taken: set[str] = set()
    splits = {}
    for split in ("test", "validation", "calibrate", "train"):
        rng = random.Random(f"{seed}/{split}")
        rows = []
        while len(rows) < SIZES[split]:
            k = len(rows) % MAX_K + 1
            question = make_question(rng, k)
            if question in taken:
                continue
            taken.add(question)
            rows.append(
                {
                    "id": f"{split}-{len(rows):04d}",
                    "question": question,
                    "answer": answer_of(question),
                    "split": split,
                    "k": k,
                }
            )
        splits[split] = rows
    return splits


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in build().items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(split: str, folder: Path = FOLDER) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
