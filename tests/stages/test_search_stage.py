"""What the searches of one test question share, and what each is charged."""

from __future__ import annotations

from types import SimpleNamespace

from say import QUESTION, SAMPLES, VALUES, Bench

from flywheel.models.prm import together
from flywheel.recipe import EvaluateSpec
from flywheel.records import Problem, Split
from flywheel.search.best_of_n import BestOfN
from flywheel.search.plan import Entry, Plan
from flywheel.search.revise import Revise
from flywheel.stages.search import OneQuestion

HARD = Revise(4)
PLAN = Plan("serve", {}, tuple(Entry(b, 4, s, 5, 1.0, 10.0) for b, s in ((1, BestOfN(2)), (2, HARD))))


def test_the_head_s_bin_chooses_from_the_plan_and_costs_its_prompt_and_a_token():
    bench = Bench(SAMPLES, VALUES, reviser=SAMPLES, head=["2"])
    ctx = SimpleNamespace(recipe=SimpleNamespace(evaluate=EvaluateSpec(budget=4, probe=2)), round=1)
    problem = Problem(QUESTION, "16", Split.TEST)
    one = OneQuestion(ctx, None, bench.searcher, problem, PLAN, BestOfN(4))
    [(guessed, named)] = bench.driver.run([0], lambda _: together([one.after_head(), one.by(HARD)]))
    asked = len(bench.searcher.prompts.solve(QUESTION)) + 1
    assert guessed.tokens == named.tokens + asked and guessed.answer == named.answer
    assert guessed.solutions == named.solutions and len(named.solutions) == 4
    assert bench.ledger.tokens() == guessed.tokens  # both methods are served by the same four draws
