"""Test questions that are nearly in the other splits: reported, never dropped (templates are legitimate)."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flywheel.records import Problem, Split

WORDS = 8  # in a row: shorter phrases recur by themselves
SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Near:
    """`share` of the test question's runs of WORDS words stand in the `other` question too."""

    question_id: str
    other: str
    share: float


def near(problems: Mapping[Split, Sequence[Problem]]) -> list[Near]:
    """Test questions that share at least SHARE of their runs of words with one question of another split, nearest first.

    Compared without case and punctuation. A question of fewer than WORDS words has no run and cannot be near.
    """
    holders: dict[tuple[str, ...], list[str]] = {}
    for split in (s for s in Split if s is not Split.TEST):
        for problem in problems.get(split, ()):
            for run in runs(problem.question.text):
                holders.setdefault(run, []).append(problem.question.id)
    found = []
    for problem in problems.get(Split.TEST, ()):
        mine = runs(problem.question.text)
        shared = Counter(id for run in mine for id in holders.get(run, ()))
        if shared:
            other, count = shared.most_common(1)[0]
            if count >= SHARE * len(mine):
                found.append(Near(problem.question.id, other, count / len(mine)))
    return sorted(found, key=lambda n: (-n.share, n.question_id))


def runs(text: str) -> set[tuple[str, ...]]:
    """Every run of WORDS words, case and punctuation apart."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}
