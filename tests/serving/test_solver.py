"""Answers with their confidence and bill, on a scripted device."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from say import QUESTION, SAMPLES, VALUES, Bench, ids

from flywheel.errors import UserError
from flywheel.models.published import PublishedPrm
from flywheel.problems.grading import DEFAULT_CHECKER, Grader
from flywheel.recipe import ProblemSpec, PublishedSpec, load
from flywheel.records import Candidate, Finish, ModelRef, Problem, Role, Split
from flywheel.runs.run import Run
from flywheel.search.adaptive import Adaptive, certainty
from flywheel.search.beam import Beam
from flywheel.search.best_of_n import BestOfN
from flywheel.search.greedy import Greedy
from flywheel.search.plan import Entry, Plan
from flywheel.search.revise import Revise
from flywheel.search.strategies import named
from flywheel.search.strategy import judge
from flywheel.serving.batch import checker_of, finished, opened, right
from flywheel.serving.solver import Ask, Solved, Solver
from flywheel.serving.system import System, by_published
from flywheel.solve import read_questions
from tests import micro

EASY, HARD = BestOfN(2), Revise(4)
PLAN = Plan("serve", {}, tuple(Entry(b, 4, s, 5, 1.0, 10.0) for b, s in ((1, EASY), (2, HARD))))


def solve(bench: Bench, ask: Ask, plan: Plan | None = None, edges=(0.5,)) -> Solved:
    solver = Solver(bench.searcher, plan, edges, 2)
    [found] = bench.driver.run([QUESTION], lambda q: solver.solve(q, ask))
    return found


def test_an_answer_has_its_share_of_the_votes_its_certainty_and_every_token_on_the_bill():
    bench = Bench(SAMPLES, VALUES)
    found = solve(bench, Ask(BestOfN(3)))
    # 16 (0.4), 18 (0.7), 16 (0.4): the scores by `last` make 18 the best single one and 16 the winner
    assert found.answer == "16" and found.share == pytest.approx(0.8 / 1.5) and found.best.score == 0.4
    assert found.certainty == pytest.approx(certainty({"16": 0.8 / 0.7, "18": 1.0})) and 0.5 < found.certainty < 0.6
    assert (found.strategy, found.guide, found.bin) == ("best_of_n:3:weighted", "asked", None)
    spent = sum(row["prompt"] + row["generated"] + row["scored"] for row in bench.ledger.rows())
    assert found.tokens == spent == found.prompt + found.generated + found.scored and found.generated > 0
    assert not found.cut_off and len(found.candidates) == 3


def test_the_plan_is_followed_in_the_bin_that_the_probe_guesses():
    easy = solve(Bench(SAMPLES, VALUES), Ask(budget=9), PLAN)
    assert (easy.guide, easy.bin, easy.strategy) == ("probe", 1, EASY.name)  # mean of 0.4 and 0.7, edge 0.5
    assert len(easy.candidates) == 2
    bench = Bench(SAMPLES, VALUES, reviser=SAMPLES)
    hard = solve(bench, Ask(budget=4), PLAN, edges=(0.6,))
    assert (hard.bin, hard.strategy) == (2, HARD.name)
    assert len({c.solution.id for c in hard.candidates}) == len(hard.candidates) == 6  # four attempts, two of the probe


@pytest.mark.parametrize("said, bin", [("1", 1), ("2", 2), ("ok", 1)])
def test_a_head_names_the_bin_for_the_prompt_and_one_token(said, bin):
    """A word that is no bin counts as the middle one, which of two bins is the first."""
    bench = Bench(SAMPLES, VALUES, reviser=SAMPLES, head=[said])
    found = solve(bench, Ask(budget=4), PLAN)
    strategy = EASY if bin == 1 else HARD
    assert (found.guide, found.bin, found.strategy) == ("head", bin, strategy.name)
    alone = solve(Bench(SAMPLES, VALUES, reviser=SAMPLES), Ask(strategy))
    asked = len(bench.searcher.prompts.solve(QUESTION)) + 1
    assert found.tokens == alone.tokens + asked and len(found.candidates) == len(alone.candidates)
    assert found.answer == alone.answer


def test_no_head_is_asked_where_a_strategy_is_named_or_the_plan_has_only_one():
    plan = Plan("serve", {}, tuple(Entry(b, 4, EASY, 5, 1.0, 10.0) for b in (1, 2)))
    for ask, guide in ((Ask(EASY), "asked"), (Ask(budget=4), "plan")):
        bench = Bench(SAMPLES, VALUES, head=["1"])
        assert solve(bench, ask, plan).guide == guide and not bench.devices[Role.HEAD].asked


def test_no_probe_is_paid_for_where_the_plan_has_one_strategy_for_all_bins():
    plan = Plan("serve", {}, tuple(Entry(b, 4, EASY, 5, 1.0, 10.0) for b in (1, 2)))
    found = solve(Bench(SAMPLES, VALUES), Ask(budget=4), plan)
    assert (found.guide, found.strategy, found.bin) == ("plan", EASY.name, None) and len(found.candidates) == 2


def test_without_a_plan_it_samples_until_the_vote_is_decided():
    found = solve(Bench(SAMPLES, VALUES), Ask(budget=4))
    assert (found.guide, found.strategy) == ("adaptive", Adaptive(4).name) and found.bin is None


@pytest.mark.parametrize("limit", [1, 40, 60, 90, 120, 150, 200, 400])
@pytest.mark.parametrize("plan, head", [(None, None), (PLAN, None), (PLAN, ["1"]), (PLAN, ["2"])])
def test_a_limit_on_tokens_is_never_exceeded_and_whatever_was_finished_answers(limit, plan, head):
    bench = Bench(SAMPLES, VALUES, reviser=SAMPLES, head=head)
    found = solve(bench, Ask(budget=4, tokens=limit), plan, edges=(0.9,))
    assert found.tokens <= limit
    assert found.cut_off if limit <= 60 else limit < 400 or not found.cut_off
    assert (found.answer is not None) == any(c.solution.answer for c in found.candidates)
    assert len({c.solution.id for c in found.candidates}) == len(found.candidates)


@pytest.mark.parametrize(
    "text, strategy",
    [
        ("greedy", Greedy()),
        ("greedy:reviser", Greedy("reviser")),
        ("best_of_n:16:weighted", BestOfN(16)),
        ("best_of_n:16:majority:temperature=0.5", BestOfN(16, "majority", 0.5)),
        ("beam:16:width=4", Beam(16, 4)),
        ("beam:16:width=sqrt", Beam(16, 4)),
        ("revise:16:chains=4:last", Revise(4, 4, "last")),
        ("adaptive:8:reviser:sure=0.9", Adaptive(8, 0.9, "reviser")),
    ],
)
def test_a_strategy_by_its_name(text, strategy):
    assert named(text) == strategy


@pytest.mark.parametrize(
    "text, said",
    [
        ("beem:4", "did you mean beam?"),
        ("best_of_n", "wanted, as in best_of_n:16"),
        ("best_of_n:0", "a number of generations below a million is wanted"),
        ("best_of_n:4:loud", "no key of best_of_n is known by loud"),
        ("best_of_n:4:max_budget=0", "max_budget is no option"),
        ("best_of_n:" + "9" * 5000, "below a million"),
        ("beam:4:wide=2", "unknown key of beam"),
        ("adaptive:4:sure=7", "sure: Input should be less than 1"),
        ("beam:2:width=4", "does not fit 2 generations"),
    ],
)
def test_a_strategy_that_does_not_exist_is_one_line(text, said):
    with pytest.raises(UserError, match=said) as raised:
        named(text)
    assert text in str(raised.value) and "\n" not in str(raised.value)


def test_votes_without_scores_outweigh_a_probe_with_scores():
    """The plan's majority of 5 draws; only the probe was judged."""
    bench = Bench(["Answer 16", "Answer 18"], VALUES, reviser=["Answer 18"])
    plan = Plan("serve", {}, (Entry(1, 4, Revise(4, select="majority"), 5, 1.0, 10.0), Entry(2, 4, EASY, 5, 1.0, 10.0)))
    found = solve(bench, Ask(budget=4), plan, edges=(0.0,))
    assert found.answer == "18" and found.share == pytest.approx(5 / 6) and found.certainty > 0.9


def test_a_greedy_answer_that_is_cut_off_leaves_the_vote_of_the_probe():
    plan = Plan("serve", {}, (Entry(1, 4, Greedy(), 5, 1.0, 10.0), Entry(2, 4, EASY, 5, 1.0, 10.0)))
    found = [
        solve(Bench(["Answer 16"], VALUES), Ask(budget=4, tokens=limit), plan, edges=(0.0,))
        for limit in range(40, 120, 4)
    ]
    cut = [one for one in found if one.cut_off and one.candidates]
    assert cut and {one.answer for one in cut} == {"16"} and {len(one.candidates) for one in cut} == {1, 2}
    assert not found[-1].cut_off and found[-1].strategy == cut[0].strategy == Greedy().name


def test_a_line_that_a_kill_cut_short_is_asked_again(tmp_path):
    out = tmp_path / "answers.jsonl"
    assert finished(out) == set() and out.read_text() == ""
    whole = '{"id": "a", "question": "x\u2028y", "answer": "1"}\n{"id": "c", "question": "z", "error": "too long"}\n'
    out.write_text(whole + '{"id": "b", "ans')
    assert finished(out) == {("a", "x\u2028y")} and out.read_text() == whole
    out.write_text("a,b\n")
    with pytest.raises(UserError, match="answers.jsonl: not what flywheel solve writes"):
        finished(out)
    with pytest.raises(UserError, match="none/answers.jsonl: cannot be written"):
        finished(tmp_path / "none" / "answers.jsonl")


def test_questions_have_ids_of_their_own_and_faults_name_their_line(tmp_path):
    asked = tmp_path / "asked.jsonl"
    asked.write_text(
        '\ufeff{"id": 0, "question": "a\u2028b"}\n\n{"id": 1, "question": "c", "answer": 7}\n{"question": "d"}\n'
        '{"id": "e", "question": "e", "answer": ["1", "one"]}\n'
    )
    found = read_questions(asked)
    assert [(p.id, p.question.text, p.answer, p.also) for p in found] == [
        ("0", "a\u2028b", "", ()),
        ("1", "c", "7", ()),
        ("4", "d", "", ()),
        ("e", "e", "1", ("one",)),
    ]
    for text, said in (
        ('{"question": "a"}\n{"q": "b"}', "asked.jsonl:2: a field question"),
        ("{", "asked.jsonl:1: not JSON"),
        ('{"id": 1, "question": "a"}\n{"id": 1, "question": "b"}', "asked.jsonl:2: the id 1 occurs twice"),
        ('{"question": "a", "answer": {"b": 1}}', "asked.jsonl:1: answer: text or a number wanted"),
        ("\n", "asked.jsonl: no questions"),
    ):
        asked.write_text(text)
        with pytest.raises(UserError, match=said):
            read_questions(asked)


def test_what_is_right_is_the_checker_s_verdict_and_undecided_is_neither():
    found = solve(Bench(SAMPLES, VALUES), Ask(BestOfN(3)))
    task = {"task": "chain_sum", "train": 1, "calibrate": 1, "validation": 1, "test": 1}
    spec = ProblemSpec(format="reasoning_gym", tasks=[task], check_seconds=5)
    assert checker_of(spec).checker == DEFAULT_CHECKER != spec.checker
    with Grader(checker_of(spec)) as grader:
        problems = [Problem(QUESTION, gold, Split.TEST) for gold in ("16", "18")]
        assert [asyncio.run(right(grader, problem, found)) for problem in problems] == [True, False]
    with Grader(spec) as grader:
        assert asyncio.run(right(grader, Problem(QUESTION, "no entry", Split.TEST), found)) is None


def test_a_published_prm_judges_in_place_of_the_round_s_and_follows_no_plan(tmp_path):
    recipe = load("recipes/chain.yaml", ["engine.kv_cache_mb=16"])
    base = ModelRef("policy_0", recipe.model.base)
    served = System(Run(tmp_path, recipe), 1, {Role.POLICY: base, Role.PRM: base}, PLAN)
    with pytest.raises(UserError, match="its recipe names no prm.published"):
        by_published(served)
    published = PublishedSpec(model=micro.with_value_head(base.base, tmp_path / "rival"), format="skywork")
    rival = recipe.model_copy(update={"prm": recipe.prm.model_copy(update={"published": published})})
    with opened(by_published(replace(served, run=Run(tmp_path, rival)))) as (kit, solver):
        made = kit.reader.solution(ids(SAMPLES[0]), Finish.STOP, id="q1/0", question_id="q1", purpose="x", model="x")
        [[judged]] = kit.backend.run([0], lambda _: judge(QUESTION, [Candidate(made)], solver.searcher.prm))
        [found] = kit.backend.run([QUESTION], lambda q: solver.solve(q, Ask(budget=2)))
    assert isinstance(solver.searcher.prm, PublishedPrm) and 0 < judged.score < 1 and judged.score_cost > 0
    assert (found.guide, found.tokens > 0) == ("adaptive", True)
