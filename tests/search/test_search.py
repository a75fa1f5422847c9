"""The strategies on a scripted device (`say.py`): what they sample, what they judge, what they are charged."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from say import QUESTION, SAMPLES, VALUES, Bench, ids

from flywheel.ledger import metered
from flywheel.records import Finish, Question, Role, Step
from flywheel.search.adaptive import Adaptive
from flywheel.search.beam import Beam, Prefix
from flywheel.search.best_of_n import BestOfN
from flywheel.search.dvts import Dvts
from flywheel.search.greedy import Greedy
from flywheel.search.particle import Particle
from flywheel.search.revise import Revise
from flywheel.search.run import read_off, search


def test_best_of_n_weighted_sums_scores_and_judges_an_equal_solution_once():
    bench = Bench({"": SAMPLES}, VALUES)
    outcome = bench.search(BestOfN(5))
    assert outcome.answer == "18"  # 0.7 + 0.7 against 0.4 + 0.4
    assert [c.score for c in outcome.candidates] == [0.4, 0.7, 0.4, 0.0, 0.7]
    assert [c.solution.id for c in outcome.candidates] == [f"q1/t/{i}" for i in range(5)]
    assert {(c.solution.purpose, c.solution.model) for c in outcome.candidates} == {("best_of_n", "policy_1")}
    assert outcome.candidates[3].solution.answer is None and outcome.candidates[4].solution.text == "Answer 18"
    assert (len(outcome.candidates), outcome.strategy, outcome.cut_off) == (5, "best_of_n:5:weighted", False)
    assert len(bench.judged()) == 3  # no second time for the equal one, none for the one without an answer


def test_a_majority_asks_no_verifier():
    bench = Bench({"": SAMPLES[:3]}, VALUES)
    outcome = bench.search(BestOfN(3, "majority"))
    assert outcome.answer == "16" and not bench.judged()
    assert bench.ledger.tokens() == outcome.tokens == sum(c.cost for c in outcome.candidates)


@pytest.mark.parametrize(
    ("how", "score", "reads"), [("last", 0.4, 1), ("min", 0.4, 3), ("product", 0.9 * 0.8 * 0.4, 3)]
)
def test_only_the_values_that_the_aggregation_needs_are_asked_for(how, score, reads):
    bench = Bench({"": SAMPLES[:1]}, VALUES, how=how)
    [candidate] = bench.search(BestOfN(1)).candidates
    assert (
        candidate.score == pytest.approx(score) and len(candidate.values) == len(bench.devices[Role.PRM].read) == reads
    )
    assert len(bench.judged()) == 1  # one request, however many reads


BEAM = {
    "": ["5 +3 =8\n", "5 +3 =9\n", "5 +3 =8\n", "5 +3 =7\n"],
    "5 +3 =8\n": ["8 *2 =16\n", "Answer 8"],
    "5 +3 =9\n": ["9 *2 =18\n", "9 *2 =18\n"],
    "5 +3 =8\n8 *2 =16\n": ["Answer 16", "Answer 16\n"],
    "5 +3 =9\n9 *2 =18\n": ["Answer 18"],
}
BEAM_VALUES = {
    "5 +3 =8": 0.9,
    "5 +3 =9": 0.6,
    "5 +3 =7": 0.1,
    "8 *2 =16": 0.8,
    "Answer 8": 0.2,
    "9 *2 =18": 0.5,
    "Answer 16": 0.95,
    "Answer 18": 0.3,
}


def test_beam_search_by_hand():
    """Four beams of width two. The copy of =8 competes once, =7 is dropped, and `Answer 8` leaves with its place."""
    bench = Bench(BEAM, BEAM_VALUES)
    outcome = bench.search(Beam(4, 2))
    texts = [c.solution.text for c in outcome.candidates]
    assert texts == [
        "5 +3 =8\nAnswer 8",
        "5 +3 =8\n8 *2 =16\nAnswer 16",
        "5 +3 =8\n8 *2 =16\nAnswer 16",
        "5 +3 =9\n9 *2 =18\nAnswer 18",
    ]
    assert [c.values for c in outcome.candidates] == [(0.9, 0.2), (0.9, 0.8, 0.95), (0.9, 0.8, 0.95), (0.6, 0.5, 0.3)]
    assert outcome.answer == "16" and len(outcome.candidates) == 4 and outcome.strategy == "beam:4:2"
    assert {c.solution.draw for c in outcome.candidates} == {"q1/t"}  # beams share their beginnings
    assert all(c.solution.finish is Finish.STOP for c in outcome.candidates)
    assert [c.solution.id for c in outcome.candidates] == [f"q1/t/{i}" for i in range(4)]
    assert bench.devices[Role.POLICY].dealt == {
        "": 4,
        "5 +3 =8\n": 2,
        "5 +3 =9\n": 2,
        "5 +3 =8\n8 *2 =16\n": 2,
        "5 +3 =9\n9 *2 =18\n": 1,
    }
    assert sorted(said.split("\n")[-1] for said in bench.judged()) == sorted(BEAM_VALUES)  # each distinct prefix once
    assert outcome.tokens == bench.ledger.tokens()


@pytest.mark.parametrize(("how", "kept"), [("last", "18"), ("min", "16"), ("product", "16")])
def test_a_beam_ranks_prefixes_by_the_aggregation(how, kept):
    """At the third step two places are open, so one prefix is kept: values (.9, .6) against (.5, .7)."""
    lines = {
        "": ["5 +3 =8\n", "5 +3 =9\n"],
        "5 +3 =8\n": ["8 *2 =16\n", "Answer 8"],
        "5 +3 =9\n": ["9 *2 =18\n", "Answer 9"],
        "5 +3 =8\n8 *2 =16\n": ["Answer 16"],
        "5 +3 =9\n9 *2 =18\n": ["Answer 18"],
    }
    values = {
        "5 +3 =8": 0.9,
        "5 +3 =9": 0.5,
        "8 *2 =16": 0.6,
        "9 *2 =18": 0.7,
        "Answer 8": 0.1,
        "Answer 9": 0.1,
        "Answer 16": 0.8,
        "Answer 18": 0.8,
    }
    outcome = Bench(lines, values, how=how).search(Beam(4, 2))
    assert [c.solution.answer for c in outcome.candidates] == ["8", "9", kept, kept] and outcome.answer == kept


LOOK = {
    "": ["5 +3 =8\n", "5 +3 =9\n"],
    "5 +3 =8\n": ["8 *2 =16\n"],  # the greedy step after it, and the next one of the beam
    "5 +3 =9\n": ["Answer 9"],
    "5 +3 =8\n8 *2 =16\n": ["Answer 16"],
}


def test_lookahead_judges_a_prefix_where_greedy_steps_lead():
    """=9 looks better by itself (0.6 against 0.5) and ends badly (0.1 against 0.8): =8 is kept; three end early."""
    values = {"5 +3 =8": 0.5, "5 +3 =9": 0.6, "8 *2 =16": 0.8, "Answer 9": 0.1, "Answer 16": 0.95}
    for k, seen in ((1, (0.8, 0.95, 0.95)), (3, (0.95, 0.95, 0.95))):
        bench = Bench(LOOK, values)
        outcome = bench.search(Beam(2, 2, lookahead=k))
        assert [c.solution.text for c in outcome.candidates] == ["5 +3 =8\n8 *2 =16\nAnswer 16"] * 2
        assert outcome.candidates[0].values == seen and outcome.answer == "16"
        assert len(outcome.candidates) == 2 and outcome.strategy == f"beam:2:2:lookahead{k}"
        assert outcome.tokens == bench.ledger.tokens() > Bench(LOOK, values).search(Beam(2, 2)).tokens
        purposes = {purpose for (_, purpose) in bench.ledger._spent}
        assert purposes == {"beam", "lookahead", "verify"}
    assert Bench(LOOK, values).search(Beam(2, 2)).answer == "9"


@pytest.mark.parametrize("how", ["product", "min"])
def test_lookahead_still_judges_the_step_itself(how):
    """By the step looked ahead alone (0.9, 0.8) the wrong =9 would be kept; with its own value it is not."""
    values = {"5 +3 =8": 0.9, "5 +3 =9": 0.2, "8 *2 =16": 0.8, "Answer 9": 0.9, "Answer 16": 0.95}
    bench = Bench(LOOK, values, how=how)
    outcome = bench.search(Beam(2, 2, lookahead=1))
    assert [c.solution.answer for c in outcome.candidates] == ["16", "16"]
    assert outcome.candidates[0].values == (0.9, 0.8, 0.95)  # of the steps themselves, each once


def test_a_blank_step_is_not_judged_again():
    lines = {"": ["5 +3 =8\n"], "5 +3 =8\n": ["\n"], "5 +3 =8\n\n": ["Answer 16"]}
    bench = Bench(lines, BEAM_VALUES)
    [candidate] = bench.search(Beam(1, 1)).candidates
    assert candidate.values == (0.9, 0.9, 0.95) and len(candidate.solution.steps) == 3
    assert len(bench.judged()) == 2


def test_a_beam_cuts_off_what_never_ends():
    endless = {"*": ["5 +3 =8\n"]}
    by_rounds = Bench(endless, VALUES).search(Beam(4, 2, max_rounds=3))
    assert [len(c.solution.steps) for c in by_rounds.candidates] == [3] * 4
    by_steps = Bench(endless, VALUES, max_steps=2).search(Beam(4, 2))
    assert [len(c.solution.steps) for c in by_steps.candidates] == [2] * 4
    by_tokens = Bench(endless, VALUES, max_tokens=10).search(Beam(4, 2))  # steps of four tokens
    assert [len(c.solution.tokens) for c in by_tokens.candidates] == [10] * 4
    for outcome in (by_rounds, by_steps, by_tokens):
        assert outcome.answer is None and len(outcome.candidates) == 4
        assert {c.solution.finish for c in outcome.candidates} == {Finish.LENGTH}


def test_a_beam_wider_than_itself_is_refused():
    with pytest.raises(ValueError, match="width of 1 to 2"):
        Bench(BEAM, BEAM_VALUES).search(Beam(2, 4))


ATTEMPTS = [f"Answer {i}" for i in range(1, 9)]


def test_a_revision_sees_the_last_four_attempts_oldest_first():
    bench = Bench(reviser=ATTEMPTS)
    outcome = bench.search(Revise(8, select="majority"))
    seen = [said.replace("\n", " ").split(" Again") for said in bench.devices[Role.REVISER].asked]
    assert [[part.strip() for part in parts if part.strip()] for parts in seen] == [
        ATTEMPTS[max(0, i - 4) : i] for i in range(8)
    ]
    solutions = [c.solution for c in outcome.candidates]
    assert [s.attempt for s in solutions] == list(range(1, 9))
    assert [s.parent for s in solutions] == [None, *(s.id for s in solutions[:-1])]
    assert {(s.purpose, s.model, s.draw) for s in solutions} == {("revise", "reviser_1", "q1/t/0")}


def test_an_attempt_without_an_answer_is_no_context():
    bench = Bench(reviser=["Answer 1", "5 +3 =8\n", "Answer 3"])
    outcome = bench.search(Revise(3, select="majority"))
    assert [c.solution.answer for c in outcome.candidates] == ["1", None, "3"]
    asked = bench.devices[Role.REVISER].asked
    assert asked[1] == asked[2] and outcome.candidates[2].solution.parent == "q1/t/1"


def test_context_that_does_not_fit_loses_its_oldest_attempts_and_says_so():
    head = len(ids("Q 5 +3 *2 ?\nTry "))
    room = head + 2 * len(ids("Answer 1\nAgain ")) + 32  # two attempts and max_tokens
    bench = Bench(reviser=ATTEMPTS, max_model_len=room)
    bench.search(Revise(5, select="majority"))
    assert (
        bench.devices[Role.REVISER].asked[4].count("Again") == 2 and "Answer 3" in bench.devices[Role.REVISER].asked[4]
    )


def test_chains_are_independent_and_selected_within_and_then_across():
    values = {f"Answer {i}": v for i, v in {5: 0.3, 8: 0.6, 9: 0.7, 4: 0.5}.items()}
    lines = {"": ["Answer 5", "Answer 5"], "Answer 5\nAgain": ["Answer 8", "Answer 4"]}
    bench = Bench(reviser=lines, values=values)
    outcome = bench.search(Revise(2, chains=2))
    assert [c.solution.answer for c in outcome.candidates] == ["5", "8", "5", "4"]
    assert [c.solution.parent for c in outcome.candidates] == [None, "q1/t/0", None, "q1/t/2"]
    assert (
        outcome.answer == "8"
    )  # 0.6 beats 0.3 in its chain, 0.5 beats 0.3 in the other; pooled it is a tie of 5 and 8
    assert Bench(reviser=lines).search(Revise(2, chains=2, select="majority")).answer == "5"


def test_the_best_one_and_the_last_ones():
    bench = Bench({"": SAMPLES}, {**VALUES, "Answer 16": 0.71})
    assert (
        bench.search(BestOfN(5, "best")).answer == "16"
        and Bench({"": SAMPLES}, VALUES).search(BestOfN(5)).answer == "18"
    )
    lines = {
        "": ["Answer 5", "Answer 5", "Answer 4"],
        "Answer 5\nAgain": ["Answer 8", "Answer 5"],
        "Answer 4\nAgain": ["Answer 8"],
    }
    bench = Bench(reviser=lines)
    outcome = bench.search(Revise(2, chains=3, select="last"))
    assert outcome.answer == "8" and not bench.judged()  # last attempts 8, 5, 8; of all six, 5 is as frequent and first
    assert Bench(reviser=lines).search(Revise(2, chains=3, select="majority")).answer == "5"


STRATEGIES = [
    BestOfN(5, "best"),
    Beam(4, 2, lookahead=1),
    Revise(2, 2, "last"),
    BestOfN(5),
    BestOfN(3, "majority"),
    Beam(4, 2),
    Revise(4),
    Revise(2, 2, "majority"),
    Greedy(),
    Dvts(4, 2),
    Particle(4),
    Adaptive(4, 0.9, step=2),
    Adaptive(5, 0.7, "reviser", 2),
]


def test_every_token_of_every_question_in_flight_is_charged_to_that_question():
    bench = Bench(
        {**BEAM, "": [*SAMPLES, *BEAM[""]]},
        {**VALUES, **BEAM_VALUES, "5 +3 =7": 0.1},
        {"*": ["Answer 16", "Answer 18"]},
    )
    bench.devices[Role.POLICY].lines["*"] = ["Answer 16", "9 *2 =18\n"]
    jobs = [
        (strategy, Question(f"q{i}", text))
        for strategy in STRATEGIES
        for i, text in enumerate(["5 +3 *2", "5 +3 *2 -6 +11", "40"])
    ]

    async def one(i: int):
        with metered() as spent:
            outcome = await search(*jobs[i], bench.searcher, tag=f"t{i}")
        return outcome, spent

    done = bench.driver.run(range(len(jobs)), one)
    assert sum(outcome.tokens for outcome, _ in done) == bench.ledger.tokens()
    for i, (outcome, spent) in enumerate(done):
        assert outcome.tokens == spent.tokens == spent.prompt + spent.generated + spent.scored > 0
        if not isinstance(jobs[i][0], Beam | Dvts | Particle):  # whose solutions share prefixes
            assert outcome.tokens == sum(c.cost + c.score_cost for c in outcome.candidates)


def test_best_of_n_is_charged_prompt_and_samples_and_scores():
    bench = Bench({"": SAMPLES[:3]}, VALUES)
    outcome = bench.search(BestOfN(3))
    head, check = len(ids("Q 5 +3 *2 ?\nTry ")), len(ids("Q 5 +3 *2 ?\nCheck "))
    sample = len(ids(SAMPLES[0]))  # as long as the other two
    scored = check + sample  # a judge makes no token
    assert outcome.tokens == 3 * (head + sample + 1) + 2 * scored  # EOS is generated; two are distinct
    assert [c.score_cost for c in outcome.candidates] == [scored, scored, 0]


def limit_bench() -> Bench:
    bench = Bench(
        {**BEAM, "": [*SAMPLES, *BEAM[""]]},
        {**VALUES, **BEAM_VALUES, "5 +3 =7": 0.1},
        {"*": ["Answer 16", "Answer 18"]},
    )
    bench.devices[Role.POLICY].lines["*"] = ["Answer 16", "9 *2 =18\n"]
    return bench


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_limit_is_never_passed_and_the_search_answers_with_what_it_has(strategy):
    whole = limit_bench().search(strategy)
    ample = limit_bench().search(strategy, limit=100_000)
    assert (ample.candidates, ample.answer, ample.tokens, ample.cut_off) == (
        whole.candidates,
        whole.answer,
        whole.tokens,
        whole.cut_off,
    )
    cut_off = []
    for limit in range(0, whole.tokens + 60, 23):
        bench = limit_bench()
        outcome = bench.search(strategy, limit=limit)
        assert outcome.tokens == bench.ledger.tokens() <= limit
        assert not any(device.waiting for device in bench.devices.values())
        answers = {c.solution.answer for c in outcome.candidates} - {None}
        assert outcome.answer in answers if answers else outcome.answer is None
        cut_off.append(outcome.cut_off)
    assert cut_off[0] and sorted(cut_off, reverse=True) == cut_off  # cut off until the limit is ample


def test_a_search_cut_off_between_sampling_and_judging():
    head = len(ids("Q 5 +3 *2 ?\nTry "))
    sampled = 5 * head + sum(len(ids(text)) + 1 for text in SAMPLES[:4]) + len(ids(SAMPLES[4]))
    nothing_judged = Bench({"": SAMPLES}, VALUES).search(BestOfN(5), limit=sampled + 32)
    assert nothing_judged.cut_off and len(nothing_judged.candidates) == 5
    assert nothing_judged.answer == "16" and nothing_judged.tokens <= sampled + 32  # a majority, and the first of two


def test_a_smaller_strategy_is_read_off_a_larger_one():
    bench = Bench({"": SAMPLES}, VALUES, ATTEMPTS)
    whole = bench.search(BestOfN(5))
    for n, how in ((2, "weighted"), (3, "majority"), (5, "weighted")):
        fresh, read = Bench({"": SAMPLES}, VALUES).search(BestOfN(n, how)), read_off(BestOfN(5), whole, BestOfN(n, how))
        assert (read.answer, read.tokens, len(read.candidates)) == (fresh.answer, fresh.tokens, n)
        assert read.strategy == fresh.strategy == f"best_of_n:{n}:{how}"
        assert [(c.solution.text, c.score, c.cost, c.score_cost) for c in read.candidates] == [
            (c.solution.text, c.score, c.cost, c.score_cost) for c in fresh.candidates
        ]
    chain = bench.search(Revise(4, select="majority"))
    begun = read_off(Revise(4, select="majority"), chain, Revise(2, select="majority"))
    assert [c.solution.answer for c in begun.candidates] == ["1", "2"] and begun.tokens < chain.tokens
    made = replace(whole.candidates[0], cost=10, score_cached=0)
    texts = [
        replace(made.solution, steps=(Step("a", (n,)),), id=chain + str(i), draw=chain + "1", attempt=i)
        for chain, i, n in (("a", 1, 1), ("a", 2, 2), ("b", 1, 2), ("b", 2, 3))
    ]
    scored = [replace(made, solution=text, score_cost=paid) for text, paid in zip(texts, (3, 4, 0, 5))]
    firsts = read_off(Revise(2, 2), replace(whole, candidates=tuple(scored)), Revise(1, 2))
    assert [c.score_cost for c in firsts.candidates] == [3, 4] and firsts.tokens == 27  # as if drawn alone
    grid = bench.search(Revise(3, 4, select="majority"))
    part = read_off(Revise(3, 4, select="majority"), grid, Revise(2, 2, select="last"))
    assert [c.solution.id for c in part.candidates] == [
        "q1/t/0",
        "q1/t/1",
        "q1/t/3",
        "q1/t/4",
    ] and part.strategy == "revise:2x2:last"
    assert part.answer == grid.candidates[1].solution.answer and part.tokens == sum(
        grid.candidates[i].cost for i in (0, 1, 3, 4)
    )
    for done, wanted in [
        (BestOfN(5), BestOfN(6)),
        (BestOfN(5, "majority"), BestOfN(2)),
        (BestOfN(5), Beam(4)),
        (Beam(16), Beam(4)),
        (Revise(4), Revise(4, 2)),
        (Revise(4), Revise(2, context=2)),
    ]:
        assert not done.covers(wanted)


def test_adaptive_sampling_stops_when_the_vote_is_decided():
    sure = Bench({"": ["Answer 16"]}, {"Answer 16": 1.0}).search(Adaptive(16, 0.95))
    # equal solutions are judged once and all of them vote: Beta(1 + 4, 1) above 1/2 with 1 - 1/32 = 0.969
    assert sure.answer == "16" and len(sure.candidates) == 4
    assert [bool(c.score_cost) for c in sure.candidates] == [True, False, False, False]
    torn = Bench({"": ["Answer 16", "Answer 18"]}, {"Answer 16": 0.5, "Answer 18": 0.4}).search(
        Adaptive(10, 0.95, step=4)
    )
    assert len(torn.candidates) == 10 and torn.answer == "16"
    low = Bench({"": ["Answer 16"]}, {"Answer 16": 0.1}).search(Adaptive(64, 0.9, step=2))
    assert len(low.candidates) == 4  # scores count in units of the highest: 1 - 0.5 ** 3 < 0.9 < 1 - 0.5 ** 5
    mixed = Bench({"": ["Answer 16", "Answer 16", "Answer 18"]}, {"Answer 16": 0.5, "Answer 18": 0.05}).search(
        Adaptive(64, 0.9, step=3)
    )
    assert len(mixed.candidates) == 6  # Beta(3, 1.1) is above a half with 0.857, Beta(5, 1.2) with 0.944
    assert len(Bench({"": ["5 +3 =8\n"]}, VALUES).search(Adaptive(8)).candidates) == 8  # no answer decides nothing


def test_what_is_sooner_sure_is_read_off_what_is_later():
    lines = {"": SAMPLES[:4]}
    whole = Bench(lines, VALUES).search(Adaptive(16, 0.99, step=2))
    for wanted in (Adaptive(16, 0.6, step=2), Adaptive(4, 0.99, step=2), Adaptive(3, 0.99, step=2)):
        fresh, read = Bench(lines, VALUES).search(wanted), read_off(Adaptive(16, 0.99, step=2), whole, wanted)
        assert (read.answer, read.tokens, len(read.candidates), read.strategy) == (
            fresh.answer,
            fresh.tokens,
            len(fresh.candidates),
            fresh.strategy,
        )
    assert len(read.candidates) == 3 and not Adaptive(4).covers(Adaptive(8))
    assert not Adaptive(16, 0.9, step=2).covers(Adaptive(16, 0.99, step=2))


def test_the_reviser_s_first_attempts_can_be_what_is_drawn():
    bench = Bench({"": ["Answer 18"]}, VALUES, {"*": ["Answer 16"]})
    assert bench.search(Adaptive(2, maker="reviser")).answer == "16" and not bench.devices[Role.POLICY].asked


def test_a_strategy_whose_model_is_missing_is_refused():
    searcher = Bench(BEAM, BEAM_VALUES).searcher
    for lacking, strategy in [
        ("prm", BestOfN(4)),
        ("prm", Beam(4)),
        ("prm", Revise(4)),
        ("reviser", Revise(4)),
        ("policy", BestOfN(4)),
    ]:
        poorer = replace(searcher, **{lacking: None})
        assert searcher.can(strategy) and not poorer.can(strategy)
        with pytest.raises(ValueError, match="needs a model"):
            asyncio.run(search(strategy, QUESTION, poorer, tag="t"))
    assert replace(searcher, prm=None).can(BestOfN(4, "majority")) and replace(searcher, policy=None).can(
        Revise(4, select="majority")
    )


def test_an_unknown_way_to_select_is_refused():
    with pytest.raises(ValueError, match="best_of_n:2:loudest: no such way to select"):
        Bench({"": SAMPLES}, VALUES).search(BestOfN(2, "loudest"))


# ---- odd questions ----

EVERY = [
    Greedy(),
    Dvts(1, 1),
    Particle(1),
    BestOfN(1),
    BestOfN(1, "majority"),
    BestOfN(1, "best"),
    Beam(1, 1),
    Beam(1, 1, lookahead=1),
    Revise(1),
    Revise(1, 1, "majority"),
    Revise(1, 1, "last"),
]
STEPS = {"": ["5 +3 =8\n"], "5 +3 =8\n": ["8 *2 =16\n"], "5 +3 =8\n8 *2 =16\n": ["Answer 16"]}


@pytest.mark.parametrize("strategy", EVERY, ids=str)
def test_a_budget_of_one_is_one_sample_whatever_the_strategy(strategy):
    bench = Bench(STEPS if isinstance(strategy, Beam | Dvts | Particle) else {"": SAMPLES}, VALUES, {"": SAMPLES})
    outcome = bench.search(strategy)
    assert outcome.answer == "16" and len(outcome.candidates) == 1 and outcome.tokens > 0


@pytest.mark.parametrize(
    "strategy",
    [
        BestOfN(3),
        BestOfN(3, "majority"),
        BestOfN(3, "best"),
        Beam(4, 2),
        Revise(3),
        Revise(2, 2, "majority"),
        Revise(2, 1, "last"),
    ],
    ids=str,
)
def test_a_question_of_which_nothing_can_be_read_has_no_answer_and_is_charged(strategy):
    bench = Bench(
        {"": ["5 +3 =8\n8 *2 =16"], "*": ["8 *2 =16"]},
        {"5 +3 =8": 0.5, "8 *2 =16": 0.5},
        {"": ["5 +3 =8"], "*": ["5 +3 =8"]},
    )
    outcome = bench.search(strategy)
    assert (
        outcome.answer is None
        and outcome.tokens > 0
        and all(c.solution.answer is None and c.score == 0 for c in outcome.candidates)
    )


def test_where_all_scores_are_equal_the_vote_decides_and_then_the_first():
    level = dict.fromkeys(VALUES, 0.5)
    assert Bench({"": SAMPLES}, level).search(BestOfN(3)).answer == "16"  # two of three
    assert Bench({"": SAMPLES[:2]}, level).search(BestOfN(2)).answer == "16"  # one each
    assert Bench({"": SAMPLES}, dict.fromkeys(VALUES, 0.0)).search(BestOfN(3)).answer in ("16", "18")
    assert Bench({"": SAMPLES[1::-1]}, level).search(BestOfN(2, "best")).answer == "18"


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1])
def test_a_value_that_is_none_names_the_question_and_the_model(value):
    with pytest.raises(ValueError, match="question q1: prm_1 gave the value"):
        Bench({"": SAMPLES}, dict.fromkeys(VALUES, value)).search(BestOfN(2))


# ---- temperature, greedy, and other searches by step ----


def test_a_strategy_samples_at_its_own_temperature():
    """The recipe's is 1; greedy asks for 0, and a strategy at another temperature draws anew."""
    strategies = (BestOfN(2), BestOfN(2, temperature=0.4), Greedy(), Greedy("reviser"), Revise(2, temperature=0.3))
    for strategy, wanted in zip(strategies, (1.0, 0.4, 0.0, 0.0, 0.3)):
        bench = Bench({"": SAMPLES}, VALUES, {"*": SAMPLES})
        outcome = bench.search(strategy)
        sampled = [ask.temperature for role in (Role.POLICY, Role.REVISER) for ask in bench.devices[role].sampled]
        assert set(sampled) == {wanted} and len(sampled) == len(outcome.candidates)
    assert BestOfN(2, temperature=0.4).name == "best_of_n:2:weighted:t0.4"
    assert not BestOfN(4).covers(BestOfN(2, temperature=0.4))
    for step_by_step in (Beam(2, 2, temperature=0.6), Dvts(2, 2, temperature=0.6), Particle(2, temperature=0.6)):
        bench = Bench({"": ["5 +3 =8\n", "5 +3 =9\n"], "*": ["Answer 16"]}, VALUES)
        bench.search(step_by_step)
        assert {ask.temperature for ask in bench.devices[Role.POLICY].sampled} == {0.6}
        assert step_by_step.name.endswith(":t0.6")
    greedy = Bench({"": SAMPLES}, VALUES)
    assert greedy.search(Greedy()).answer == "16" and not greedy.judged()


def test_dvts_keeps_the_best_step_of_each_tree():
    """One beam of 4 goes on from =8 (0.9) alone; two trees of 2 keep the best of their own, =8 and =9."""
    lines = {
        "": ["5 +3 =8\n", "5 +3 =8\n", "5 +3 =9\n", "5 +3 =9\n"],
        "5 +3 =8\n": ["Answer 16"],
        "5 +3 =9\n": ["Answer 18"],
    }
    bench = Bench(lines, VALUES)
    outcome = bench.search(Dvts(4, 2))
    assert sorted(c.solution.answer for c in outcome.candidates) == ["16", "16", "18", "18"]
    assert [c.solution.answer for c in Bench(lines, VALUES).search(Beam(4, 4)).candidates] == ["16"] * 4
    assert len({c.solution.draw for c in outcome.candidates}) == 2  # the trees are independent draws
    assert len({c.solution.id for c in outcome.candidates}) == 4
    assert outcome.tokens == bench.ledger.tokens()
    half = read_off(Dvts(4, 2), outcome, Dvts(2, 2))
    assert Dvts(4, 2).covers(Dvts(2, 2)) and half.candidates == outcome.candidates[:2]
    alone = Bench({"": lines[""][:2], "5 +3 =8\n": ["Answer 16"]}, VALUES).search(Dvts(2, 2))
    assert half.tokens == alone.tokens > 0 and sum(c.cost for c in outcome.candidates) == outcome.tokens


@pytest.mark.parametrize(("power", "seen"), [(1.0, {"16", "18"}), (9.0, {"16"})])
def test_particles_survive_by_their_odds(power, seen):
    """=8 has odds of 9, =9 of 3 in 7: by these both survive in 64 particles, to the ninth power only =8 does."""
    lines = {"": ["5 +3 =8\n", "5 +3 =9\n"], "5 +3 =8\n": ["Answer 16"], "5 +3 =9\n": ["Answer 18"]}
    bench = Bench(lines, VALUES)
    outcome = bench.search(Particle(64, power))
    assert {c.solution.answer for c in outcome.candidates} == seen and len(outcome.candidates) == 64
    again = Bench(lines, VALUES).search(Particle(64, power))
    assert [c.solution.tokens for c in again.candidates] == [c.solution.tokens for c in outcome.candidates]
    assert len(bench.judged()) == 2 + len(seen)  # equal prefixes are judged once


def test_a_prefix_drawn_more_often_has_more_particles_to_lose():
    """Three of four first steps are =9 (odds 3 / 7), one is =8 (odds 9): shares 9 / 7 to 9."""
    alive = [Prefix((1,), (0.3,), 0.3, 3), Prefix((2,), (0.9,), 0.9, 1)]
    kept = dict(Particle(8000).keep(random.Random(0), alive, 8000))
    share = kept[Prefix((1,), (0.3,), 0.3, 3)] / 8000
    assert share == pytest.approx((9 / 7) / (9 / 7 + 9), abs=0.02)  # four standard errors
