"""What the harvest keeps of verified solutions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flywheel.recipe import load
from flywheel.records import Difficulty, Finish, Grade, Problem, Question, Solution, Split, Step, Verdict
from flywheel.stages import harvest


def drawn(question: str, number: int, text: str) -> Solution:
    return Solution(
        f"{question}/{number}",
        question,
        (Step(text, (number,)),),
        Finish.STOP,
        "7",
        "sample",
        "policy_0",
        f"{question}/{number}",
    )


@pytest.mark.parametrize(("vote", "kept"), [("answer", {"often"}), ("trace", set())])
def test_a_text_of_its_own_is_kept_where_draws_vote_by_answer(vote, kept, tmp_path, monkeypatch):
    """A language model seldom writes one text twice: by trace, nothing that verified would be kept."""
    solutions = [drawn("often", i, f"way {i}: 7") for i in range(3)] + [drawn("once", 9, "luck: 7")]
    records = {Solution: solutions, Grade: [Grade(s.id, s.question_id, Verdict.CORRECT, "sample") for s in solutions]}
    monkeypatch.setattr(harvest, "difficulties", lambda ctx: {q: Difficulty(q, 0.5, 3, 3) for q in ("often", "once")})
    monkeypatch.setattr(harvest, "search_models", lambda ctx: {})
    ctx = SimpleNamespace(
        recipe=load("recipes/chain.yaml", [f"harvest.vote={vote}", "harvest.keep=4", "problems.step_checker=null"]),
        problems=lambda split: [Problem(Question(q, q), "7", Split.TRAIN) for q in ("often", "once")],
        read=lambda cls, stage: records[cls] if stage == "sample" else [],
        round=1,
        dir=tmp_path,
    )
    figures = harvest.finish(ctx)
    assert figures["verified"] == 4 and figures["kept"] == (3 if kept else 0)
    assert figures["too_few_votes"] == 4 - figures["kept"] and figures["questions"] == len(kept)
