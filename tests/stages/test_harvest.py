"""What the harvest keeps of verified solutions."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pytest
from stage_files import store

from flywheel.recipe import load
from flywheel.records import Difficulty, Finish, Grade, Problem, Question, Solution, Split, Step, Verdict
from flywheel.runs.run import Context
from flywheel.search.best_of_n import BestOfN
from flywheel.search.plan import Entry, Plan
from flywheel.stages import harvest
from flywheel.stages.harvest import balanced
from flywheel.stages.kit import Kit
from flywheel.stages.shared import enough_votes


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
    questions = ["often", "once"]
    solutions = [drawn("often", i, f"way {i}: 7") for i in range(3)] + [drawn("once", 9, "luck: 7")]
    grades = [Grade(s.id, s.question_id, Verdict.CORRECT, "sample") for s in solutions]
    store(tmp_path, 1, "sample", questions, [*solutions, *grades])
    store(tmp_path, 1, "harvest", questions, [])
    monkeypatch.setattr(harvest, "difficulties", lambda ctx: {q: Difficulty(q, 0.5, 3, 3) for q in questions})
    monkeypatch.setattr(harvest, "search_models", lambda ctx: {})
    recipe = load("recipes/chain.yaml", [f"harvest.vote={vote}", "harvest.keep=4", "problems.step_checker=null"])
    ctx = Context(recipe, tmp_path, 1, harvest.STAGE)
    monkeypatch.setattr(ctx, "problems", lambda *splits: [Problem(Question(q, q), "7", Split.TRAIN) for q in questions])
    figures = harvest.finish(ctx)
    assert figures["verified"] == 4 and figures["kept"] == (3 if kept else 0)
    counted = enough_votes(recipe.harvest, solutions[:3])  # by which calibration counts what a strategy would add
    assert set(counted) == ({f"way {i}: 7" for i in range(3)} if kept else set())
    assert figures["too_few_votes"] == 4 - figures["kept"] and figures["questions"] == len(kept)


@pytest.mark.parametrize(("extra", "again"), [(0, []), (6, [["chain", "half", "hard"], ["half", "hard"]])])
def test_questions_without_a_verified_solution_are_sampled_on_until_they_have_one(extra, again, monkeypatch):
    rights = {
        "easy": (2, 0),
        "half": (1, 0),
        "late": (1, 1),
        "chain": (0, 1),
        "hard": (0, 0),
    }  # in the sample stage, in the harvest
    samples = {q: [drawn(q, i, "7") for i in range(3)] for q in rights}
    judged = {
        q: [(s, Verdict.CORRECT if i < rights[q][0] else Verdict.INCORRECT) for i, s in enumerate(group)]
        for q, group in samples.items()
    }
    plan = Plan("harvest", {}, (Entry(3, 4, BestOfN(4), 5, 1.0, 10.0),))
    asked = {}

    async def searched(q, searcher, strategy, tag):
        asked.setdefault(tag, {})[q] = strategy
        verdict = Verdict.CORRECT if rights[q][1] else Verdict.INCORRECT
        chain = [  # two right attempts of one chain are one draw
            replace(drawn(q, 9, f"attempt {attempt}"), id=f"{q}/{tag}/{attempt}", draw=f"{q}/{tag}")
            for attempt in (1, 2)
        ]
        return [*chain, *(Grade(made.id, q, verdict, "revise") for made in chain)]

    monkeypatch.setattr(harvest, "difficulties", lambda ctx: {q: Difficulty(q, 0.5, 3, 3) for q in rights})
    monkeypatch.setattr(harvest, "search_models", lambda ctx: {})
    monkeypatch.setattr(harvest, "sampled", lambda ctx, question: judged[question])
    settings = [f"harvest.extra={extra}", "harvest.budget=4", "harvest.min_votes=2", "harvest.vote=answer"]
    ctx = SimpleNamespace(
        recipe=load("recipes/chain.yaml", settings), figures=lambda stage: {"harvest": plan.to_dict()}, round=1
    )
    kit = Kit(*[None] * 7)
    kit.searcher, kit.searched = lambda reviser: None, searched
    made = asyncio.run(harvest.work(ctx, kit, list(rights)))
    assert asked.pop("r1/harvest") == dict.fromkeys(rights, BestOfN(4))
    for first, n, questions in zip((0, 4), (4, 2), again):
        assert asked.pop(f"r1/extra{first}") == dict.fromkeys(questions, BestOfN(n, select="majority"))
    assert not asked and len(made) == 4 * (len(rights) + sum(map(len, again)))


def test_a_bin_is_cut_to_its_share_and_keeps_what_most_draws_wrote():
    names, bins, votes = [*(f"e{i}" for i in range(8)), "h"], [1] * 8 + [5], [*range(9, 1, -1), 2]
    rows = pa.table({"question_id": names, "bin": bins, "votes": votes})
    assert sum(balanced(rows, 3.0)) == 9  # 27 / 2 a bin: nothing is cut
    assert balanced(rows, 1.0).tolist() == [True] * 4 + [False] * 4 + [True]
    assert balanced(rows.take(list(range(9))[::-1]), 1.0).tolist() == [True] + [False] * 4 + [True] * 4
    assert balanced(rows[:0], 1.0).tolist() == []
