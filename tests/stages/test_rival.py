"""A published PRM beside the round's own, on the scripted device: what both judge, select and cost."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from say import QUESTION, SAMPLES, TOKENIZER, VALUES, Bench, Say

from flywheel.models.driver import Backend, ServedModel
from flywheel.models.prm import Prm
from flywheel.problems.grading import Grader
from flywheel.recipe import CalibrateSpec, ProblemSpec, StrategySpec
from flywheel.records import Answered, Problem, Split
from flywheel.search.best_of_n import BestOfN
from flywheel.search.plan import Entry, Plan, Trial
from flywheel.stages.calibrate import rival_figures, try_all
from flywheel.stages.kit import PUBLISHED, Kit
from flywheel.stages.search import OneQuestion

PROBLEM = Problem(QUESTION, "16", Split.CALIBRATE)
KEYS = {"prm:base": {**VALUES, "Answer 16": 0.1}, PUBLISHED: {**VALUES, "Answer 16": 0.9, "Answer 18": 0.1}}


def opened(policy: list[str]):
    """A bench, and a kit with the round's PRM, the base as one, and a published one that knows better."""
    bench = Bench(policy, VALUES)
    devices = {key: Say(values=values) for key, values in KEYS.items()}
    prms = {"prm": bench.searcher.prm}
    for key, device in devices.items():
        engine = ServedModel(key, key, 10, 256, device, bench.ledger)
        prms[key] = Prm(engine, bench.searcher.prompts, ("ok", "no"), "last")
    driver = Backend({"prm": bench.searcher.prm.engine}, [*bench.devices.values(), *devices.values()])
    recipe = SimpleNamespace(
        calibrate=CalibrateSpec(strategies=[StrategySpec(kind="best_of_n")], budgets=[1, 2, 5]),
        harvest=SimpleNamespace(min_votes=2, vote="trace"),
        prm=SimpleNamespace(published=object()),
    )
    grader = Grader(ProblemSpec(path="none"))
    kit = Kit(recipe, driver, bench.searcher.prompts, None, grader, {QUESTION.id: PROBLEM}, bench.ledger)
    kit.prm, kit.engine = lambda key="prm": prms[key], lambda: bench.searcher.policy
    return bench, kit, driver, devices


def test_calibration_shows_both_prms_on_the_same_draws():
    """Of five draws 16 (0.4 each) loses to 18 (0.7 each) by the round's PRM, and wins by the published one."""
    bench, kit, driver, devices = opened(SAMPLES)
    known = {QUESTION.id: ()}

    def tried(rival: Prm | None) -> list:
        [rows] = driver.run([0], lambda _: try_all(kit, bench.searcher, {QUESTION.id: 1}, known, "t", rival))
        return rows

    rows = tried(kit.prm(PUBLISHED))
    trials, answered = ([row for row in rows if isinstance(row, kind)] for kind in (Trial, Answered))
    assert bench.devices["policy"].dealt.total() == 5 and len(devices[PUBLISHED].asked) == 3  # distinct, with an answer
    assert {row.method: row.correct for row in answered} == {
        f"best_of_n_weighted@{n}_published_verifier": True for n in (1, 2, 5)
    }
    assert [row.tokens for row in answered] == [trial.tokens for trial in trials]  # the same texts and draws
    figures = rival_figures(trials, answered)
    assert [(row["budget"], row["own"][0], row["published"][0]) for row in figures] == [(1, 1, 1), (2, 0, 1), (5, 0, 1)]
    assert [row["published_less_own"] for row in figures] == [(0, 0, 0), (1, 1, 1), (1, 1, 1)]
    assert not [row for row in tried(None) if isinstance(row, Answered)]


def test_search_selects_from_the_samples_by_every_verifier():
    bench, kit, driver, devices = opened(["Answer 16"])
    pool = [c.solution for c in Bench(SAMPLES, VALUES).search(BestOfN(5)).candidates]
    evaluate = SimpleNamespace(budget=4, probe=1, revise_attempts=2)
    ctx = SimpleNamespace(recipe=SimpleNamespace(evaluate=evaluate), round=1)
    plan = Plan("serve", {}, (Entry(1, 4, BestOfN(4), 5, 1.0, 10.0),))
    searcher = replace(bench.searcher, reviser=None)

    def searched(published: object) -> dict:
        kit.recipe.prm.published = published
        one = OneQuestion(ctx, kit, searcher, PROBLEM, plan, BestOfN(4))
        [(found, _)] = driver.run([0], lambda _: one.all(pool, pool[0], 1, []))
        return found

    found = searched(object())
    answers = {end: found[f"best_of_n_weighted@4{end}"].answer for end in ("", "_base_verifier", "_published_verifier")}
    assert answers == {
        "": "16",
        "_base_verifier": "18",
        "_published_verifier": "16",
    }  # 0.8, 0.2, 1.8 against 0.7, 0.7, 0.1
    drawn = sum(len(bench.searcher.prompts.solve(QUESTION)) + len(s.tokens) + 1 for s in pool[:4])
    read = sum(len(TOKENIZER.encode(f"Q {QUESTION.text} ?\nCheck {text}")) for text in SAMPLES[:2])
    assert found["best_of_n_weighted@4_published_verifier"].tokens == drawn + read
    assert len(devices[PUBLISHED].asked) == 2
    assert searched(None).keys() == found.keys() - {"best_of_n_weighted@4_published_verifier"}
