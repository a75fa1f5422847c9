"""The arithmetic behind the claims, on a study made by hand."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from eval import elsewhere, flops_matched, foreign_prm, on_policy_reviser, oracle_size, pictures
from eval.claims import Study, Table, amortise, combine, judge, markdown, measure, multiplier
from eval.study import Difficult, Drawn, Tried, arguments, largest, parts, shape, wanted
from flywheel.errors import UserError
from flywheel.records import Adaptive, Beam, Finish, Revise, Solution, Step, Trajectory
from flywheel.search.plan import name
from flywheel.training import PrmExample

EASY, HARD = [f"q{i:02d}" for i in range(40)], [f"q{i:02d}" for i in range(40, 100)]  # two bins, and three


def drawn(question: str, answers: str, scores: list[float], gold: str = "a") -> list[Drawn]:
    return [
        Drawn(question, answer if answer != "-" else None, score, answer == gold, 10, 5, 3, "")
        for answer, score in zip(answers, scores)
    ]


def study(tried: list[Tried] | None = None) -> Study:
    """Best-of-4 answers the easy questions and the beam the hard ones; pools of eight."""
    difficult = [
        Difficult(q, 100 - i, 100, 1 - i / 100, 4, 100, 60, i // 10, 1 + i // 20, 9) for i, q in enumerate(EASY + HARD)
    ]
    pool = [d for q in EASY for d in drawn(q, "aab-aaab", [0.9, 0.8, 0.95, 0, 0.9, 0.8, 0.1, 0.95])]
    pool += [d for q in HARD for d in drawn(q, "bbbbbbba", [0.5] * 8)]
    beams = [Tried(q, "beam:4:4", 4, q in HARD, q in HARD, 70, 20, 0.5, "short") for q in EASY + HARD]
    return Study(difficult, pool, tried or beams)


def test_best_of_n_is_the_mean_over_disjoint_groups_of_the_pool():
    s = study()
    assert s.sizes == [1, 2, 4, 8]
    assert s.best_of_n(1, "weighted")[0] == 5 / 8 and s.best_of_n(1, "majority")[40] == 1 / 8
    assert s.best_of_n(2, "best")[0] == 0.5  # aa right; b- wrong; aa right; ab: b has the higher score
    assert s.best_of_n(2, "weighted")[0] == 0.5 and s.best_of_n(4, "weighted")[0] == 1.0
    assert s.best_of_n(8, "majority")[40] == 0.0
    assert s.best_of_n_tokens(4, "majority")[0] == 40
    # each group judges its distinct solutions once, and none without an answer: 40 + 3 x 5 and 40 + 4 x 5; 40 + 5 and 40 + 2 x 5
    assert s.best_of_n_tokens(4, "weighted")[[0, 40]].tolist() == [57.5, 47.5] and s.best_of_n_tokens(8, "weighted")[
        [0, 40]
    ].tolist() == [100, 90]
    assert s.best_of_n_computed(4) == pytest.approx((40 * 57.5 + 60 * 47.5) / 100 - 4 * 3)


def test_a_plan_sends_each_bin_to_what_answers_it_and_is_charged_for_the_bin():
    right, tokens, paid = study().compute_optimal(4, ["beam"], "oracle")
    assert right.mean() == 1.0
    assert set(tokens[:40]) == {40.0} and set(tokens[40:]) == {
        70.0
    }  # a tie of weighted and majority goes to the cheaper
    assert np.array_equal(paid, tokens + 100)
    assert np.array_equal(study().compute_optimal(4, ["beam"], "predicted")[2], tokens + 60)


def test_probe_samples_are_paid_once():
    s = study()
    right, tokens, paid = s.compute_optimal(4, ["beam"], "probe")
    assert set(s.grade_tokens("probe")) == {60.0}
    by_vote = tokens == 40
    assert set(paid[by_vote]) == {60.0} and set(paid[~by_vote]) == {130.0}  # four samples, judged; and the beam beside


def test_accuracy_at_a_number_of_tokens_lies_between_the_measured_sizes():
    s = study()
    cost = {n: s.best_of_n_tokens(n, "weighted").mean() for n in s.sizes}
    assert cost == {1: 14.75, 2: 27.25, 4: 51.5, 8: 94.0}
    assert (
        s.at_tokens(1.0)[0] == s.best_of_n(1, "weighted")[0] and s.at_tokens(94.0)[0] == s.best_of_n(8, "weighted")[0]
    )
    assert s.at_tokens((27.25 * 51.5) ** 0.5)[0] == pytest.approx((0.5 + 1.0) / 2)
    assert np.isnan(s.at_tokens(95.0)).all()  # beyond the pool nothing is known, and nothing is claimed


def test_a_claim_is_judged_by_its_whole_interval():
    assert [judge(0.01, 0.2), judge(-0.2, -0.01), judge(-0.1, 0.1), judge(0.0, 0.1)] == [
        "holds",
        "fails",
        "undecided",
        "undecided",
    ]
    table, behind = measure(study())
    found = {c.id: c for c in combine([table], "command")}
    assert found["1.gross@4"].verdict == "holds" and found["1.gross@4"].ours == pytest.approx(0.6)
    assert found["4.low:beam:4:4"].ours == pytest.approx(0.2)  # ahead on 60 questions, behind on 40
    assert found["14.hardest"].verdict == "fails" and "beam:4:4" in found["14.hardest"].claim
    assert [row["odd_winners"] for row in behind["strategies"]] == [1.0]
    agree = {row["grade"]: row for row in behind["difficulty"]}
    assert (
        agree["predicted"]["spearman"] == pytest.approx(1.0)
        and agree["prompt"]["same_bin"] == 1.0
        and agree["prompt"]["tokens"] == 9
    )
    assert (
        agree["label"]["confusion"] == [[20 if a == b else 0 for b in range(5)] for a in range(5)]
        and agree["label"]["tokens"] == 0
    )


def test_a_figure_of_several_runs_is_the_mean_of_theirs_and_one_may_speak_of_fewer_questions():
    one, two = Table(), Table()
    one.add("x", "claim", "paper", [1.0, float("nan"), 0.0, float("nan")])
    two.add("x", "claim", "paper", [0.0, 1.0, 1.0])
    two.add("y", "only of the second", "paper", [0.5, 0.5, float("nan")])
    every = ["a", "b", "c", "d"]
    found = {c.id: c for c in combine([one.over(every, every), two.over(["d", "a", "b"], every)], "command")}
    assert found["x"].ours == pytest.approx((1 / 2 + 2 / 3) / 2) and found["x"].runs == [0.5, pytest.approx(2 / 3)]
    assert found["x"].low < found["x"].ours < found["x"].high
    assert (found["y"].ours, found["y"].low, found["y"].high, found["y"].runs) == (0.5, 0.5, 0.5, [0.5])


def test_the_whole_study_counts_or_else_the_largest_part_of_it(tmp_path):
    ask = arguments(
        [str(tmp_path), "--oracle", "8", "--judged", "4", "--pool", "16", "--budgets", "4"], "study", "about"
    )

    def finish(*titles: str) -> None:
        for title in titles:
            (tmp_path / "studies/round_1" / title).mkdir(parents=True)
            (tmp_path / "studies/round_1" / title / "finished").touch()

    finish(*parts(argparse.Namespace(**{**vars(ask), "questions": 8})), "trials_4_first_16")
    assert largest(tmp_path, ask).questions == 8  # of 16 the trials alone are drawn
    finish(*parts(ask))
    assert largest(tmp_path, ask).questions is None


def test_what_is_paid_once_is_shared_by_the_questions_served():
    rows = [
        {"of": "search", "grade": "oracle", "net_tokens": 50.0, "best_of_n_needs": 150.0},
        {"of": "revisions", "grade": "prompt", "net_tokens": 50.0, "best_of_n_needs": 40.0},
        {"of": "revisions", "grade": "probe", "net_tokens": 50.0, "best_of_n_needs": float("inf")},
    ]
    amortise({"compute_optimal": rows}, {"prm": 7.0, "reviser": 8000.0, "calibrate": 1000.0, "prompt_head": 1000.0})
    assert rows[0]["net_by_served"] == {"100": 60.0, "10000": 50.1, "1000000": 50.001} and rows[0]["break_even"] == 10.0
    assert (
        rows[1]["net_by_served"]["100"] == 150.0
        and rows[1]["break_even"] == float("inf")
        and rows[2]["break_even"] == 0.0
    )


def test_the_paper_s_multiplier_of_inference():
    assert [round(multiplier(14, r)) for r in (0.16, 0.79, 22)] == [258, 63, 16]


def test_the_accuracy_of_a_plan_costs_best_of_n_so_many_tokens():
    s = study()
    assert s.tokens_for(0.0) == 14.75 and s.tokens_for(0.99) == float("inf")
    assert [s.best_of_n(n, "weighted").mean() for n in (1, 2, 4)] == pytest.approx(
        [0.325, 0.2, 0.4]
    )  # at 14.75, 27.25 and 51.5 tokens
    assert s.tokens_for(0.35) == pytest.approx(27.25 * (51.5 / 27.25) ** 0.75)


def test_the_cheapest_strategy_is_chosen_on_the_other_half():
    s = study()
    ahead, tokens, chosen = s.cheapest(s.best_of_n(4, "weighted"))
    assert chosen == ["best_of_n:4:majority"] * 2 and set(tokens) == {40.0} and ahead.mean() == pytest.approx(0.0)


def test_a_study_is_written_out_and_drawn(tmp_path):
    table, behind = measure(study())
    behind["fixed"], behind["routing"] = {"prm": 1.0, "reviser": 0.0, "calibrate": 10.0, "prompt_head": 0.0}, []
    amortise(behind, behind["fixed"])
    text = markdown(combine([table], "command"), [behind], "about")
    assert (
        "| 1.gross@4: Compute-optimal search of 4 is ahead of best-of-4 weighted" in text
        and "| search | 4 | oracle | 1.000 | 58 | 158 | never |" in text
    )
    drawn = {"figure_3_search.png", "figure_4_8_compute_optimal.png", "net_cost.png"}
    assert {p.name for p in pictures.draw(behind, tmp_path)} == drawn
    bins = [{"bin": b, "lead": [0.1, 0.05, 0.2]} for b in range(1, 6)]
    behind["flops_matched"] = {
        "M": 3.9,
        "by_ratio": [{"R": r, "multiplier": 58.0, "by_bin": bins} for r in (0.16, 22.0)],
    }
    assert {p.name for p in pictures.draw(behind, tmp_path)} == drawn | {"figure_9_parameters.png"}


def test_parts_of_different_questions_are_refused():
    with pytest.raises(UserError, match="different questions"):
        study([Tried("q00", "beam:4:4", 4, True, True, 70, 20, 0.0, "")])


def test_every_budget_is_spent_in_full_by_every_strategy():
    asked = wanted([4, 64], True)
    cost = lambda s: (
        s.n * (s.lookahead + 1) if isinstance(s, Beam) else s.n if isinstance(s, Adaptive) else s.length * s.chains
    )
    assert all(cost(strategy) == budget for budget, strategy in asked)
    names = [name(s) for _, s in asked]
    assert {
        "beam:64:4",
        "beam:64:8",
        "beam:32:4:lookahead1",
        "beam:16:4:lookahead3",
        "revise:16x4:weighted",
        "revise:1x64:last",
    } <= set(names)
    assert not any(isinstance(s, Revise) for _, s in wanted([4], False))


def test_shapes():
    solution = lambda *texts: Solution(
        "s", "q", tuple(Step(t, (i,)) for i, t in enumerate(texts)), Finish.STOP, "1", ""
    )
    assert [shape(solution(*"ab"), n) for n in (2, 3, 1, None)] == ["", "short", "long", ""]
    assert shape(solution("a\n", "b", "a"), 3) == "repeated"


def test_a_small_model_spends_what_the_larger_one_cost_to_train():
    """Within 60 tokens best-of-4 answers the easy bins; the beam, which answers the hard ones, takes 70."""
    s = study()
    larger = {q: float(q in HARD) for q in EASY + HARD}
    found = flops_matched.compare(s, larger, answer_tokens=1.0, times=4.0)
    assert [round(row["multiplier"], 2) for row in found["by_ratio"]] == [60.25, 15.39, 4.41]
    ample, tight, least = found["by_ratio"]
    assert [row["small"] for row in ample["by_bin"]] == [1, 1, 0.125, 0.125, 0.125] and [
        row["lead"][0] for row in ample["by_bin"]
    ][:2] == [1, 1]
    assert (
        tight["by_bin"][0]["small"] == pytest.approx(5 / 8) and least["small"][0] < tight["small"][0] + 1e-9
    )  # a single sample; nothing fits 4 tokens
    right, chosen = flops_matched.best_within(s, 70)
    assert right.mean() == 1.0 and chosen[0][2:] == ["beam:4:4"] * 3


def test_what_other_studies_printed_becomes_rows_with_their_own_command(tmp_path):
    bins = [{"bin": b, "small": 0.5, "larger": 0.4, "lead": [0.1, 0.05, 0.2]} for b in range(1, 6)]
    files = {
        "flops_matched.json": {
            "command": "python -m eval.flops_matched",
            "M": 3.9,
            "by_ratio": [{"R": 22.0, "multiplier": 4.3, "lead": [0.1, 0.0, 0.2], "by_bin": bins}],
        },
        "compare_restem.json": {
            "command": "python -m eval.compare",
            "runs": {"runs/loop": [], "runs/restem": []},
            "first_less_others": {
                "runs/restem": {
                    "within_the_other_s_flops": [
                        {"rounds": [3, 2], "pass@1": [0.05, 0.03, 0.07], "flops": [2e13, 2.1e13]}
                    ]
                }
            },
        },
    }
    for file, data in files.items():
        (tmp_path / file).write_text(json.dumps(data))
    rows = {found[0]: (found, command) for found, command in elsewhere.kept(tmp_path)}
    assert rows["13.bin1@22"][0][3] == [0.1, 0.05, 0.2] and rows["13.bin5@22"][0][3] == [
        -0.1,
        -0.2,
        -0.05,
    ]  # in the hardest bin the claim is the larger model's
    claim = rows["15.restem"]
    assert (
        "`loop` are ahead of those of `restem` for no more FLOPs (rounds 3 and 2, 20.0 and 21.0 TFLOPs)" in claim[0][1]
        and claim[1] == "python -m eval.compare"
        and len(rows) == 7
    )
    (tmp_path / "compare_cut.json").write_text("")
    with pytest.raises(UserError, match="compare_cut.json: not what eval.compare prints"):
        list(elsewhere.kept(tmp_path))


def test_rows_of_other_studies_are_signed_as_their_claims_are():
    falls = {
        "trajectories": [9, 8],
        "on_less_off_policy": {"slope": [-0.2, -0.3, -0.1], "first": [0.1, 0.0, 0.2]},
        "each_run": {"slope": [-0.3, -0.1], "first": [0.2, 0.0]},
    }
    slope, first = elsewhere.on_policy_reviser(falls)
    assert (
        [slope[3], first[3]] == [[0.2, 0.1, 0.3], [-0.1, -0.2, -0.0]]
        and [slope[5], first[5]] == [[0.3, 0.1], [-0.2, -0.0]]
        and "(9, 8 trajectories each)" in slope[1]
    )
    lead = {"weighted": {"8": [9, 9, 9], "16": [0.1, 0.0, 0.2]}, "best": {"8": [9, 9, 9], "16": [0.3, 0.2, 0.4]}}
    each = {"weighted": [0.1], "best": [0.3], "exploited": [0.5]}
    found = list(elsewhere.foreign_prm({"own_less_other": lead, "other_falls_more": [0.5, 0.4, 0.6], "each_run": each}))
    assert [row[3][0] for row in found] == [0.1, 0.3, 0.5] and [row[5] for row in found] == [[0.1], [0.3], [0.5]]
    gains = {
        f"{name}+history:{how}": [place, place, place]
        for place, (name, how) in enumerate([("prm", "min"), ("own", "min"), ("own", "last")])
    }
    assert [row[3][0] for row in elsewhere.history_verifier({"over_prm:min": gains})] == [0, 1]


def test_as_many_questions_and_solutions_of_each_and_the_best_n_of_the_other_half():
    examples = [
        [PrmExample((1, 2), (1,), (0.5,), question_id=f"q{i % questions}") for i in range(solutions)]
        for questions, solutions in ((10, 30), (4, 40))
    ]
    own, other = foreign_prm.alike(examples)
    assert (
        len(own) == len(other) == 12 and len({e.question_id for e in own}) == len({e.question_id for e in other}) == 4
    )
    curve = {
        1: [0.0, 1.0, 0.0, 1.0],
        2: [1.0, 0.0, 1.0, 0.0],
        4: [0.0, 0.0, 0.0, 0.0],
    }  # each half's best n is the other's worst
    assert (
        foreign_prm.falls(curve) == [0.0, 0.0, 0.0, 0.0]
        and foreign_prm.falls({1: [1.0] * 4, 4: [0.25] * 4}) == [0.75] * 4
    )
    lengths = [[2, 1, 1], [3, 2, 2, 1]]
    kinds = {
        name: [Trajectory("q", (None,) * n) for n in row] for name, row in zip(("off_policy", "on_policy"), lengths)
    }
    assert [[len(t.attempts) for t in rows] for rows in on_policy_reviser.alike(kinds).values()] == [[1, 2], [1, 2]]


def test_bins_by_few_samples_are_held_against_other_samples():
    rights = {
        f"q{i}": [j % 10 < i for j in range(40)] for i in range(10)
    }  # both halves alike, the first four samples nearly blind
    found = oracle_size.compare(rights, 400.0)
    few, many, half = found["by_samples"]
    assert [row["samples"] for row in found["by_samples"]] == [4, 16, 20] and few["tokens"] == 40.0
    assert half["spearman"] == pytest.approx(1) and half["same_bin"] == (1.0, 1.0, 1.0)
    assert few["spearman"] < many["spearman"] <= half["spearman"] and few["same_bin"][0] < 1
