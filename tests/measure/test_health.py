"""One broken adapter of each kind: its fault is named with its figure, and it is not used."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from stage_files import seal, store

from flywheel.measure.health import copies, faults, health
from flywheel.recipe import load
from flywheel.records import Finish, Grade, Role, Solution, Step, Verdict
from flywheel.runs.manifest import FORMAT
from flywheel.runs.run import Context, Run
from flywheel.stages import choose_reviser, gate


def solution(id: str, text: str, question: str = "q", *, finish: Finish = Finish.STOP, **more) -> Solution:
    steps = tuple(Step(line, tuple(map(ord, line))) for line in text.split("\n"))
    return Solution(id, question, steps, finish, text[-1], **{"purpose": "", "model": "policy_0", "draw": id} | more)


def drawn(text, questions: int = 10, n: int = 4, **more) -> list[Solution]:
    """`n` samples a question; `text` says what each writes."""
    return [solution(f"q{q}/{i}", text(q, i), f"q{q}", **more) for q in range(questions) for i in range(n)]


SOUND = drawn(lambda q, i: f"{q} +{i}\nso {q + i % 2}")


def test_the_figures_of_samples_by_hand():
    one_each = health(drawn(lambda q, i: f"it is {q}"))
    assert (
        one_each.entropy == pytest.approx(1.0) and one_each.tokens == 7 and one_each.repeated == one_each.truncated == 0
    )
    assert health(drawn(lambda q, i: "it is 7")).entropy == 0
    mixed = health([solution("a", "x\nx", "q1"), solution("b", "x\ny", "q2", finish=Finish.LENGTH)])
    assert (mixed.repeated, mixed.truncated, mixed.tokens) == (0.5, 0.5, 2)
    assert health([solution("a", "x")]).entropy == 1.0
    with pytest.raises(ValueError, match="no solutions"):
        health([])


@pytest.mark.parametrize(
    "planted, named",
    [
        (drawn(lambda q, i: "7 +1\nso 8"), "collapsed: entropy of its samples 0.00 x log(questions), "),
        (drawn(lambda q, i: f"{q} +{i}\n{q} +{i}"), "repeated: 100% of samples, 0% before"),
        (drawn(lambda q, i: f"{q} +{i}\nso {q}", finish=Finish.LENGTH), "truncated: 100% of samples, 0% before"),
        (drawn(lambda q, i: f"{q}{i}"), "mean length 2 tokens, 8 before"),
    ],
)
def test_each_planted_fault_is_named_with_its_figure(planted, named):
    assert any(fault.startswith(named) for fault in faults(health(planted), health(SOUND)))
    assert faults(health(SOUND), health(SOUND)) == []


def test_the_gate_refuses_a_collapsed_policy_that_a_figure_would_let_pass(tmp_path):
    """Every question has the same answer, and the new policy says nothing else: all right, and worthless."""

    def decided(name: str, after: list[Solution]) -> dict:
        root, questions = tmp_path / name, sorted({s.question_id for s in SOUND})
        for stage, solutions, verdict in (("sample", SOUND, Verdict.INCORRECT), ("gate", after, Verdict.CORRECT)):
            grades = [Grade(s.id, s.question_id, verdict) for s in solutions]
            store(root, 1, stage, questions, [*solutions, *grades])
        seal(root, 1, "distill", {"trained": True})
        return gate.finish(Context(load("recipes/chain.yaml", ["sample.calibrate=4"]), root, 1, gate.STAGE))

    refused = decided("collapsed", drawn(lambda q, i: "7 +1\nso 8"))
    assert refused["gain"][1] > 0 and not refused["passed"] and refused["policy"] == "policy_0"
    assert refused["why"].startswith("collapsed: entropy of its samples 0.00")
    sound = decided("sound", SOUND)
    assert sound["passed"] and sound["policy"] == "policy_1" and "why" not in sound


def test_what_a_reviser_copies_is_counted_after_incorrect_attempts_only():
    a, b = solution("0", "3 +4\nso 8"), solution("1", "3 +4\nso 7")
    assert copies([[(a, False), (a, False), (b, True), (b, True)]]) == 0.5  # the right one repeats itself rightly
    assert copies([[(b, True), (b, True)], []]) == 0.0


@pytest.mark.parametrize("copying, chosen", [({4}, 8), ({8}, 4), ({4, 8}, None)])
def test_a_reviser_that_copies_is_not_chosen(tmp_path, copying, chosen):
    """Checkpoint 8 has the better attempts; one that copies is passed over whatever its figure."""
    attempts, grades = [], []
    for step in (4, 8):
        (tmp_path / "train_reviser" / f"step-{step}").mkdir(parents=True)
        for question in range(4):
            for attempt in (1, 2):
                text = "3 +4\nso 8" if attempt == 1 or step in copying else "3 +4\nso 7"
                id, model = f"q{question}/r1/step{step}/{attempt}", f"reviser_1@{step}"
                attempts.append(solution(id, text, f"q{question}", attempt=attempt, model=model))
                right = attempt == 2 and question < step // 4
                grades.append(Grade(attempts[-1].id, f"q{question}", Verdict.CORRECT if right else Verdict.INCORRECT))
    ctx = SimpleNamespace(
        round=1,
        dir=tmp_path / "choose_reviser",
        path=lambda stage: tmp_path / stage,
        recipe=SimpleNamespace(
            reviser=SimpleNamespace(probe_attempts=2, choose="level"), model=SimpleNamespace(base="base")
        ),
        read=lambda kind, stage: iter(grades if kind is Grade else attempts),
        figures=lambda stage: {"checkpoints": [{"step": s, "path": f"step-{s}"} for s in (4, 8)]},
    )
    found = choose_reviser.finish(ctx)
    assert (found["chosen"] and found["chosen"]["step"]) == chosen
    assert {c["step"]: c["copies"] for c in found["checkpoints"]} == {step: float(step in copying) for step in (4, 8)}
    if chosen is None:
        assert found["why"].startswith("every checkpoint copies: 100%")


@pytest.mark.parametrize("choose, chosen", [("level", 4), ("change", 8)])
def test_a_reviser_is_chosen_by_its_attempts_or_by_what_revising_adds(tmp_path, choose, chosen):
    """Checkpoint 4 is right in 3 of 4 questions at either attempt; 8 in none, then in 2."""
    attempts, grades = [], []
    for step, rights in ((4, (3, 3)), (8, (0, 2))):
        (tmp_path / "train_reviser" / f"step-{step}").mkdir(parents=True)
        for question in range(4):
            for attempt in (1, 2):
                id, model = f"q{question}/r1/step{step}/{attempt}", f"reviser_1@{step}"
                text = f"3 +4\nso {step}{attempt}"
                attempts.append(solution(id, text, f"q{question}", attempt=attempt, model=model))
                verdict = Verdict.CORRECT if question < rights[attempt - 1] else Verdict.INCORRECT
                grades.append(Grade(attempts[-1].id, f"q{question}", verdict))
    ctx = SimpleNamespace(
        round=1,
        dir=tmp_path / "choose_reviser",
        path=lambda stage: tmp_path / stage,
        recipe=SimpleNamespace(reviser=SimpleNamespace(choose=choose), model=SimpleNamespace(base="base")),
        read=lambda kind, stage: iter(grades if kind is Grade else attempts),
        figures=lambda stage: {"checkpoints": [{"step": s, "path": f"step-{s}"} for s in (4, 8)]},
    )
    found = choose_reviser.finish(ctx)
    assert found["chosen"]["step"] == chosen
    assert [(c["level"], c["change"]) for c in found["checkpoints"]] == [(0.75, 0.0), (0.5, 0.5)]


def test_a_prm_that_was_refused_leaves_the_base_to_judge(tmp_path):
    folder = tmp_path / "round_1" / "train_prm"
    folder.mkdir(parents=True)
    run = Run(tmp_path, SimpleNamespace(model=SimpleNamespace(base="base")))
    for figures, name, adapter in (
        ({"auc_within_question": 0.8}, "prm_1", str(folder / "adapter")),
        ({"refused": "worse than chance"}, "policy_0", None),
    ):
        made = {"format": FORMAT, "round": 1, "stage": "train_prm", "figures": figures}
        (folder / "manifest.json").write_text(json.dumps(made))
        ref = run.model(Role.PRM, 1)
        assert (ref.name, ref.adapter) == (name, adapter)
