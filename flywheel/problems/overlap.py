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

    Sorted by descending share. Case and punctuation are ignored; a question of fewer than WORDS words has no n-gram
    and is never listed.
    """
    holders: dict[tuple[str, ...], list[str]] = {}  # n-gram -> ids of the questions that contain it
    for split in (s for s in Split if s is not Split.TEST):
        for problem in problems.get(split, ()):
            for run in _runs(problem.question.text):
                holders.setdefault(run, []).append(problem.question.id)
    found = []
    for problem in problems.get(Split.TEST, ()):
        mine = _runs(problem.question.text)
        shared = Counter(id for run in mine for id in holders.get(run, ()))
        for other, count in shared.most_common(1):
            if count >= NEAR * len(mine):
                found.append(Near(problem.question.id, other, count / len(mine)))
    return sorted(found, key=lambda n: (-n.share, n.question_id))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}
