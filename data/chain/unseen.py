"""Chain arithmetic in which some hard facts occur in no training question: ``python -m data.chain.unseen --out DIR``.

Half of the facts of the two hardest classes are withheld: no question of train, calibrate or validation needs one. A
test question has the level `unseen` if it needs a withheld fact, else `seen`, and then it needs another hard fact. A
loop that only fills in a table from its training questions gains on `seen` alone.

    flywheel iterate --round 3 --name unseen --set problems.path=DIR
    python -m eval levels runs/unseen
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from .domain import CLASSES, FACTS, LAB_SEED, MAX_K, answer_of, facts_of, make_question

SIZES = {"train": 600, "calibrate": 160, "validation": 80, "unseen": 256, "seen": 256}
Pair = tuple[int, str]  # (value, operation)


def needed(question: str) -> set[Pair]:
    """The facts that a question needs."""
    return {(fact.value, fact.op) for fact in facts_of(question)}


def withheld(seed: int = LAB_SEED) -> tuple[set[Pair], set[Pair]]:
    """(the facts that are withheld, the other hard ones), of equal size."""
    hard = sorted(pair for pair, fact in FACTS.items() if fact.class_ in CLASSES[2:])
    random.Random(f"{seed}/unseen").shuffle(hard)
    return set(hard[: len(hard) // 2]), set(hard[len(hard) // 2 :])


def build(seed: int = LAB_SEED) -> dict[str, list[dict]]:
    """File name -> rows; both kinds of test questions are in `test`. No question occurs twice."""
    hidden, known = withheld(seed)
    wanted = {"unseen": lambda facts: facts & hidden, "seen": lambda facts: facts & known and not facts & hidden}
    taken: set[str] = set()
    files: dict[str, list[dict]] = {}
    for part, count in SIZES.items():
        rng, rows = random.Random(f"{seed}/unseen/{part}"), []
        fits = wanted.get(part, lambda facts: not facts & hidden)
        while len(rows) < count:
            question = make_question(rng, len(rows) % MAX_K + 1)
            if question in taken or not fits(needed(question)):
                continue
            taken.add(question)
            split = "test" if part in wanted else part
            level = part if part in wanted else ""
            rows.append(
                {
                    "id": f"{part}-{len(rows):04d}",
                    "question": question,
                    "answer": answer_of(question),
                    "split": split,
                    "level": level,
                }
            )
        files.setdefault("test" if part in wanted else part, []).extend(rows)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in build().items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{out}: {', '.join(f'{count} {part}' for part, count in SIZES.items())}")


if __name__ == "__main__":
    main()
