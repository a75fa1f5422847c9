"""Find test questions that nearly repeat a question of another split, as is common in templated problem sets."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flywheel.records import Problem, Split

WORDS = 8  # n of the word n-grams that are compared; shorter phrases recur by chance
NEAR = 0.5  # the least fraction of its n-grams that a near duplicate shares


@dataclass(frozen=True, slots=True)
class Near:
    """The fraction `share` of the word n-grams of test question `question_id` also occurs in question `other`."""

    question_id: str
    other: str
    share: float


def near(problems: Mapping[Split, Sequence[Problem]]) -> list[Near]:
    """Test questions that share at least the fraction NEAR of their word n-grams with a question of another split.

    Sorted by descending share; of several equally near questions the first counts. Case and punctuation are ignored; a
    question of fewer than WORDS words has no n-gram and is never listed. Memory grows with the test questions alone,
    time with all.
    """
    tests = {problem.id: _runs(problem.question.text) for problem in problems.get(Split.TEST, ())}
    holders: dict[int, list[str]] = {}  # n-gram -> ids of the test questions that contain it
    for id, runs in tests.items():
        for run in runs:
            holders.setdefault(run, []).append(id)
    best: dict[str, tuple[int, str]] = {}  # test question -> (n-grams shared, the question that shares most)
    for other in (p for split in Split if split is not Split.TEST for p in problems.get(split, ())):
        shared = Counter(id for run in _runs(other.question.text) & holders.keys() for id in holders[run])
        for id, count in shared.items():
            if count >= NEAR * len(tests[id]) and count > best.get(id, (0, ""))[0]:
                best[id] = count, other.id
    found = [Near(id, other, count / len(tests[id])) for id, (count, other) in best.items()]
    return sorted(found, key=lambda n: (-n.share, n.question_id))


def _runs(text: str) -> set[int]:
    """The text's word n-grams, by hash: 64 bits do not collide in a problem set."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return set(map(hash, zip(*(words[i:] for i in range(WORDS)))))
