"""Plans: chosen on some questions, scored on others, read by the models that they were made with."""

import json
from dataclasses import replace

import pytest

from flywheel.errors import UserError
from flywheel.recipe import CalibrateSpec
from flywheel.search.adaptive import Adaptive
from flywheel.search.beam import Beam
from flywheel.search.best_of_n import BestOfN
from flywheel.search.greedy import Greedy
from flywheel.search.plan import Plan, Trial, harvest_plan, held_out, serve_plan, simplest, table
from flywheel.search.revise import Revise
from flywheel.search.strategies import left_out, strategies

MODELS = {"policy": "policy_0", "prm": "prm_1", "reviser": "reviser_1"}
SMALL, BIG, BEAM, CHAIN = BestOfN(4), BestOfN(16), Beam(16), Revise(16)


def trials(strategy, budget, rights, *, bin=1, tokens=100, verified=None, prefix="q"):
    """One trial a question: `rights[i]` is whether question i is answered right."""
    return [
        Trial(
            f"{prefix}{bin}.{i}",
            bin,
            budget,
            strategy,
            bool(right),
            int(right) if verified is None else verified[i],
            tokens,
        )
        for i, right in enumerate(rights)
    ]


def test_a_recipe_is_expanded_into_strategies():
    spec = CalibrateSpec(
        strategies=[
            {"kind": "best_of_n"},
            {"kind": "best_of_n", "select": "majority"},
            {"kind": "beam", "width": 4},
            {"kind": "beam", "width": "sqrt", "max_rounds": 9},
            {"kind": "revise", "context": 2},
            {"kind": "adaptive", "sure": 0.8},
        ],
        budgets=[16, 2],
    )
    assert strategies(spec) == [
        (2, BestOfN(2)),
        (2, BestOfN(2, "majority")),
        (2, Beam(2, 1, 9)),
        (2, Revise(2, 1, "weighted", 2)),
        (2, Adaptive(2, 0.8)),
        (16, BestOfN(16)),
        (16, BestOfN(16, "majority")),
        (16, Beam(16, 4)),
        (16, Beam(16, 4, 9)),
        (16, Revise(16, 1, "weighted", 2)),
        (16, Adaptive(16, 0.8)),
    ]
    assert left_out(spec) == ["beam of width 4 left out at budget 2: it has only 2 beams"]
    assert Adaptive(16, 0.9, "reviser", 2).name == "adaptive:16:0.9:reviser:step2"
    assert [s.name for s in (BIG, BEAM, Revise(8, 2, "majority"))] == [
        "best_of_n:16:weighted",
        "beam:16:4",
        "revise:8x2:majority",
    ]
    assert len({s.name for _, s in strategies(spec)}) == len(strategies(spec))  # names tell them all apart


def test_lookahead_and_chains_spend_a_budget_in_the_papers_unit():
    spec = CalibrateSpec(
        strategies=[
            {"kind": "beam", "width": "sqrt", "lookahead": 3},
            {"kind": "revise", "chains": 4},
            {"kind": "revise", "chains": 4, "select": "last"},
        ],
        budgets=[4, 6, 64, 512],
    )
    assert [(budget, s.name) for budget, s in strategies(spec)] == [
        (4, "beam:1:1:lookahead3"),
        (4, "revise:1x4:weighted"),
        (4, "revise:1x4:last"),
        (64, "beam:16:4:lookahead3"),
        (64, "revise:16x4:weighted"),
        (64, "revise:16x4:last"),
        (512, "beam:128:11:lookahead3"),
    ]
    assert left_out(spec) == [
        "beam with lookahead 3 left out at budget 6: a beam costs 4, which does not divide it",
        *["revise in 4 chains left out at budget 6: they do not divide it"] * 2,
        *["revise in 4 chains left out at budget 512: of more than 64 attempts each"] * 2,
    ]


def test_the_most_accurate_strategy_of_a_bin_serves_it_and_ties_go_to_the_cheaper():
    easy = (
        trials(BIG, 16, [1, 1, 1, 1, 1, 0], tokens=500)
        + trials(BEAM, 16, [1, 1, 1, 1, 0, 1], tokens=300)
        + trials(CHAIN, 16, [1, 1, 1, 0, 0, 0], tokens=10)
    )
    hard = (
        trials(BIG, 16, [0] * 6, bin=2)
        + trials(BEAM, 16, [0] * 6, bin=2)
        + trials(CHAIN, 16, [0, 1, 0, 0, 0, 0], bin=2, tokens=900)
    )
    plan, _ = serve_plan(easy + hard, MODELS, bins=2)
    assert plan.strategy(1, 16) == BEAM and plan.strategy(2, 16) == CHAIN
    entry = plan.entries[0]
    assert (entry.questions, entry.score, entry.tokens, entry.borrowed) == (6, 5 / 6, 300, ())
    with pytest.raises(UserError, match=r"bin 1 at budget 4; it has budgets \[16\]"):
        plan.strategy(1, 4)


def fold_of(rows, seed, folds=2):
    """Question -> its fold, told by which questions the fit does not see."""
    seen: list[set[str]] = []

    def fit(some):
        seen.append({t.question_id for t in some})
        return Plan("serve", MODELS, ())

    held_out(rows, fit, folds, seed)
    return [{t.question_id for t in rows} - known for known in seen]


def test_two_fold_never_scores_a_strategy_on_the_questions_that_chose_it():
    """A strategy perfect on one fold and useless on the other looks good to a plan that scores where it chose."""
    blank = trials(BIG, 16, [0] * 20)
    fold_a, fold_b = fold_of(blank, seed=3)
    assert len(fold_a) == len(fold_b) == 10 and not fold_a & fold_b

    def good_on(strategy, fold, tokens):
        return [replace(t, strategy=strategy, correct=t.question_id in fold, tokens=tokens) for t in blank]

    steady = [
        replace(t, strategy=CHAIN, correct=i % 10 < 3, tokens=50)
        for i, t in enumerate(sorted(blank, key=lambda t: (t.question_id in fold_a, t.question_id)))
    ]
    rows = good_on(BIG, fold_a, 100) + good_on(BEAM, fold_b, 100) + steady
    plan, [honest] = serve_plan(rows, MODELS, bins=1, seed=3)
    assert plan.entries[0].score == 0.5  # what choosing and scoring on the same questions would claim
    assert honest == {"budget": 16, "questions": 20, "accuracy": 0.0, "verified": 0.0, "tokens": 100.0}


def test_folds_are_even_within_each_bin_and_hold_every_question_once():
    rows = trials(BIG, 16, [1] * 7, bin=1) + trials(BIG, 16, [0] * 6, bin=2)
    folds = fold_of(rows, seed=0)
    assert sorted(q for fold in folds for q in fold) == sorted(t.question_id for t in rows)
    for bin in (1, 2):
        sizes = [sum(q.startswith(f"q{bin}.") for q in fold) for fold in folds]
        assert max(sizes) - min(sizes) <= 1
    assert fold_of(rows, seed=0) == folds != fold_of(rows, seed=1)


def test_the_honest_score_is_by_budget():
    rows = trials(SMALL, 4, [1, 0] * 5, tokens=40) + trials(BIG, 16, [1] * 10, tokens=160)
    _, honest = serve_plan(rows, MODELS, bins=1)
    assert [(h["budget"], h["accuracy"], h["tokens"]) for h in honest] == [(4, 0.5, 40.0), (16, 1.0, 160.0)]


def test_a_bin_of_too_few_questions_borrows_from_its_neighbours_and_says_so():
    rows = []
    for bin, count in ((1, 6), (2, 2), (3, 1), (4, 6)):
        for strategy, right in ((BIG, bin < 3), (BEAM, bin >= 3)):
            rows += trials(strategy, 16, [right] * count, bin=bin)
    plan, _ = serve_plan(rows, MODELS, bins=5)
    entries = {e.bin: e for e in plan.entries}
    assert (entries[1].borrowed, entries[1].questions) == ((), 6)
    assert (entries[2].borrowed, entries[2].questions) == ((1, 3), 9) and entries[2].strategy == BIG
    assert (entries[3].borrowed, entries[3].questions) == ((2, 4), 9) and entries[3].strategy == BEAM
    assert (entries[5].borrowed, entries[5].questions) == ((4,), 6)  # no question at all


def test_a_strategy_that_was_not_tried_on_every_question_is_refused():
    with pytest.raises(ValueError, match=r"beam:16:4: 5 trials on the 6 questions of bin 1"):
        serve_plan(trials(BIG, 16, [1] * 6) + trials(BEAM, 16, [1] * 5), MODELS, bins=1)


def test_the_harvest_spends_what_easy_bins_do_not_need_on_the_hard_one():
    """Bin 1 is covered by 4 samples, so the beam that bin 2 needs is affordable; in both bins it is not."""
    rows = [
        *trials(SMALL, 4, [1] * 6, bin=1, tokens=100),
        *trials(SMALL, 4, [0] * 6, bin=2, tokens=100),
        *trials(BIG, 16, [1] * 6, bin=1, tokens=400),
        *trials(BIG, 16, [1, 0, 0, 0, 0, 0], bin=2, tokens=400),
        *trials(BEAM, 16, [1] * 6, bin=1, tokens=700),
        *trials(BEAM, 16, [1, 1, 1, 1, 0, 0], bin=2, tokens=700),
    ]
    plan = harvest_plan(rows, MODELS, budget=16, keep=4, bins=2)  # 2 x 400 tokens to spend
    assert plan.strategy(1, 16) == SMALL and plan.strategy(2, 16) == BEAM
    assert [e.score for e in plan.entries] == [1.0, pytest.approx(4 / 6)]
    dear = [replace(t, tokens=701) if t.strategy == BEAM else t for t in rows]
    plan = harvest_plan(dear, MODELS, budget=16, keep=4, bins=2)  # one token too many
    assert plan.strategy(1, 16) == SMALL and plan.strategy(2, 16) == BIG


def test_the_harvest_counts_no_more_solutions_than_it_keeps_and_ignores_selection():
    many, few = [0] * 6, [1] * 6
    rows = trials(BIG, 16, many, verified=[9] * 6, tokens=400) + trials(
        BestOfN(16, "majority"), 16, few, verified=[4] * 6, tokens=300
    )
    plan = harvest_plan(rows + trials(SMALL, 4, few, verified=[1] * 6, tokens=90), MODELS, budget=16, keep=4, bins=1)
    assert plan.strategy(1, 16) == BestOfN(16, "majority") and plan.entries[0].score == 4
    with pytest.raises(ValueError, match=r"harvest.budget: 8 is not among the calibrated budgets \[16\]"):
        harvest_plan(rows, MODELS, budget=8, keep=4, bins=1)


def test_the_harvest_plan_is_the_best_of_all_assignments():
    from itertools import product
    from random import Random

    rng, options = Random(7), [SMALL, BIG, BEAM, CHAIN]
    for _ in range(20):
        cost = {(b, s): rng.randint(50, 900) for b in (1, 2, 3) for s in options}
        gain = {(b, s): [rng.randint(0, 4) for _ in range(5)] for b in (1, 2, 3) for s in options}
        rows = [
            t
            for b in (1, 2, 3)
            for s in options
            for t in trials(s, 4 if s == SMALL else 16, [0] * 5, bin=b, tokens=cost[b, s], verified=gain[b, s])
        ]
        cheapest = min(options[1:], key=lambda s: sum(cost[b, s] for b in (1, 2, 3)))
        limit = sum(cost[b, cheapest] for b in (1, 2, 3))
        best = max(
            sum(sum(gain[b, s]) for b, s in zip((1, 2, 3), choice))
            for choice in product(options, repeat=3)
            if sum(cost[b, s] for b, s in zip((1, 2, 3), choice)) <= limit
        )
        plan = harvest_plan(rows, MODELS, budget=16, keep=4, bins=3)
        assert sum(e.score for e in plan.entries) == pytest.approx(best / 5)
        assert sum(e.tokens for e in plan.entries) <= limit


def test_a_plan_survives_json_and_refuses_other_models_and_other_schemas():
    rows = trials(BIG, 16, [1] * 6) + trials(BEAM, 16, [0] * 6) + trials(CHAIN, 16, [0] * 3 + [1] * 3)
    plan, _ = serve_plan(rows, MODELS, bins=2)
    assert plan == Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    plan.check_models(MODELS)
    with pytest.raises(UserError, match="made with prm prm_1, not prm_2: calibrate again"):
        plan.check_models({**MODELS, "prm": "prm_2"})
    with pytest.raises(UserError, match="made with reviser reviser_1, not None"):
        plan.check_models({"policy": "policy_0", "prm": "prm_1"})
    data = plan.to_dict()
    with pytest.raises(UserError, match="schema 2"):
        Plan.from_dict({**data, "schema": 2})
    for broken in (
        {},
        {**data, "entries": [{"bin": 1}]},
        {**data, "entries": [{**data["entries"][0], "strategy": {"kind": "oracle"}}]},
    ):
        with pytest.raises(UserError, match=r"x\.json: not a plan"):
            Plan.from_dict(broken, "x.json")


def test_the_table_shows_every_strategy_in_every_bin():
    rows = trials(BIG, 16, [1, 0, 1, 1], tokens=80) + trials(BEAM, 16, [0, 0, 0, 1], bin=2, verified=[0, 0, 0, 2])
    assert table(rows) == [
        {
            "bin": 1,
            "budget": 16,
            "strategy": "best_of_n:16:weighted",
            "questions": 4,
            "accuracy": 0.75,
            "verified": 0.75,
            "tokens": 80.0,
        },
        {
            "bin": 2,
            "budget": 16,
            "strategy": "beam:16:4",
            "questions": 4,
            "accuracy": 0.25,
            "verified": 0.5,
            "tokens": 100.0,
        },
    ]


def test_the_plan_s_rival_is_the_best_single_strategy_that_is_simple():
    cold = BestOfN(4, temperature=0.5)
    asked = [
        *trials(SMALL, 4, [1, 0, 0]),
        *trials(cold, 4, [1, 1, 0]),
        *trials(BestOfN(4, "majority"), 4, [1, 1, 0], tokens=90),
        *trials(Beam(4), 4, [1, 1, 1]),  # not simple
        *trials(Greedy(), 16, [1, 1, 0], tokens=5),
        *trials(BIG, 16, [1, 1, 0]),
        *trials(Revise(1, 64), 64, [1, 1, 0]),  # parallel samples of the reviser
        *trials(Revise(2, 32), 64, [1, 1, 1]),
    ]
    assert simplest(asked) == {4: BestOfN(4, "majority"), 16: Greedy(), 64: Revise(1, 64)}


def test_a_strategy_that_is_the_same_at_two_budgets_is_one_option_of_the_harvest():
    greedy = [trial for budget in (4, 16) for trial in trials(Greedy(), budget, [1, 1, 0, 0, 0], tokens=5)]
    asked = [*greedy, *trials(SMALL, 4, [1, 1, 1, 0, 0], tokens=100), *trials(BIG, 16, [1, 1, 1, 0, 0], tokens=400)]
    [entry] = harvest_plan(asked, MODELS, 4, 2, bins=1).entries
    assert entry.strategy == SMALL and entry.questions == 5  # greedy's few tokens are no limit for the others
    [four, sixteen] = serve_plan(asked, MODELS, bins=1)[0].entries
    assert (four.strategy, sixteen.strategy) == (SMALL, BIG)
