"""What stages share and choose: votes, the questions to label, the words a run needs, beam against best-of-N."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from data.chain.check import beam_over_best_of_n
from flywheel.errors import UserError
from flywheel.recipe import PrmSpec, TrainSpec, load
from flywheel.records import Finish, ModelRef, Problem, Question, Role, Solution, Split, Step
from flywheel.runs.files import write_json
from flywheel.runs.manifest import source_files
from flywheel.runs.processes import check_batches
from flywheel.runs.ranks import Ranks
from flywheel.runs.run import SKIPPED, Run
from flywheel.search.beam import Beam
from flywheel.search.best_of_n import BestOfN
from flywheel.search.plan import Trial
from flywheel.stages import label, train_reviser
from flywheel.stages.kit import preflight, prompts_and_reader
from flywheel.stages.shared import job, votes
from flywheel.stages.train_prm import Labelled, missing, pairs
from flywheel.training import PrmExample
from tests import families


def solution(id: str, text: str, draw: str | None = None) -> Solution:
    return Solution(id, "q", (Step(text, (1,)),), Finish.STOP, "7", "sample", "policy_0", draw or id)


def test_independent_draws_are_votes_and_spacing_is_not_another_trace():
    assert votes([solution("q/s/0", "3 +4 =7"), solution("q/s/1", "3  +4 =7\n"), solution("q/s/2", "4 +3 =7")]) == {
        "3 +4 =7": 2,
        "4 +3 =7": 1,
    }


def test_a_revision_chain_repeating_itself_is_one_vote():
    chain = [solution("q/r/0", "a"), solution("q/r/1", "a", "q/r/0"), solution("q/r/2", "a", "q/r/0")]
    assert votes(chain) == {"a": 1}
    assert votes([*chain, solution("q/r/3", "a")]) == {"a": 2}


def test_a_beam_search_is_one_vote_however_many_beams_agree():
    beams = [solution(f"q/r1/beam/{i}", "a", "q/r1/beam") for i in range(4)]
    assert votes(beams) == {"a": 1}
    assert votes([*beams, solution("q/r2/beam/0", "a", "q/r2/beam"), solution("q/s/0", "a")]) == {"a": 3}


def test_votes_are_in_the_order_of_the_draws_so_ties_do_not_go_by_chance():
    texts = [f"{i}" for i in range(50)]
    assert [text for text, _ in votes(solution(f"q/s/{t}", t) for t in texts).most_common()] == texts


def test_questions_that_are_sometimes_right_are_labelled_first(monkeypatch):
    rates = {f"q{i}": rate for i, rate in enumerate([0.0, 0.1, 0.5, 0.95, 1.0, 0.05])}
    monkeypatch.setattr(label, "pass_rates", lambda *stage: rates)

    def asked(count: int, prefer: tuple[float, float] = (0.1, 0.95)) -> list[str]:
        ctx = SimpleNamespace(
            problems=lambda split: [Problem(Question(q, q), "7", Split.TRAIN) for q in rates],
            recipe=SimpleNamespace(label=SimpleNamespace(questions=count, prefer=prefer)),
            seed=lambda *parts: 3,
            round=1,
        )
        return label.questions(ctx)

    assert asked(3) == ["q1", "q2", "q3"]
    assert set(asked(4)) > {"q1", "q2", "q3"} and asked(0) == sorted(rates)
    assert asked(1, (1.0, 1.0)) == ["q4"]


@pytest.mark.parametrize(
    "change, named",
    [
        ("prm.labels=[okay-then, 'no']", "prm.labels"),
        ("prm.labels=[ok, ok]", "prm.labels"),
        ("engine.max_model_len=100000", "engine.max_model_len"),
        ("engine.max_model_len=110", r"questions do not fit engine.max_model_len 110 .* the most: \d+ tokens too many"),
        ("model.lora_rank=600 engine.adapters=runtime", "model.lora_rank: 600 is more than vLLM serves"),
        ("problems.checker=tests.micro:nothing", "problems.checker: tests.micro:nothing cannot be imported"),
        ("problems.checker=flywheel.problems.code:passes_tests", "^(question|problems).*(gold answer|isolated)"),
    ],
)
def test_what_the_model_cannot_do_is_known_before_a_run_is_written(change, named):
    with pytest.raises(UserError, match=named):
        preflight(load("recipes/chain.yaml", change.split(" ") if "adapters" in change else [change]))
    assert preflight(load("recipes/chain.yaml")) == []


@pytest.mark.parametrize("key", ["reviser", "head"])
def test_a_batch_that_the_ranks_cannot_share_is_named(key):
    recipe = load("recipes/chain.yaml", [f"{key}.batch_size=16", f"{key}.micro_batch_size=16"])
    check_batches(Ranks(0, 16, 0, 16), recipe)
    with pytest.raises(UserError, match=f"{key}.batch_size: 16 cannot be shared by 32 processes"):
        check_batches(Ranks(0, 32, 0, 32), recipe)
    with pytest.raises(UserError, match=f"{key}.batch_size: 30 is not a multiple"):
        load("recipes/chain.yaml", [f"{key}.batch_size=30"])


def test_long_questions_are_left_out_of_every_split_if_the_recipe_says_so(tmp_path):
    sets = ["engine.max_model_len=110", "problems.skip_long=true"]
    recipe = load("recipes/chain.yaml", sets)
    skipped = preflight(recipe)
    every = {p.id for p in Run(tmp_path, recipe).problems(*Split)}
    assert 0 < len(skipped) < len(every) / 2
    write_json(tmp_path / SKIPPED, skipped)
    run = Run(tmp_path, recipe)
    kept = run.problems(*Split)
    assert {p.id for p in kept} == every - set(skipped)
    prompts, _ = prompts_and_reader(run)
    assert max(len(prompts.solve(p.question)) for p in kept) + recipe.sample.max_tokens <= 110
    with pytest.raises(UserError, match="they are all of the split train; raise engine.max_model_len"):
        preflight(load("recipes/chain.yaml", ["engine.max_model_len=98", "problems.skip_long=true"]))


@pytest.mark.parametrize("fit, check, lacks", [(15, 3, True), (16, 0, True), (16, 1, False)])
def test_a_prm_is_not_trained_on_too_few_examples(fit, check, lacks):
    made = PrmExample((1, 2), (2,), (1.0,))
    found = Labelled("value", set(), [made] * fit, [made] * check, silent=4, too_long=2)
    why = missing(found, PrmSpec())
    assert (why is not None) == lacks
    if why:
        assert f"{fit} labelled solutions" in why and "prm.min_examples 16" in why and "2 longer" in why


def test_auc_counts_pairs_of_a_right_and_a_wrong_solution_of_one_question():
    assert pairs(["a", "a", "a", "b", "c", "c"], [True, False, False, True, True, False]) == 3


def test_a_reviser_is_not_trained_on_too_few_examples(monkeypatch, tmp_path):
    recipe = load("recipes/chain.yaml")
    monkeypatch.setattr(train_reviser, "trajectories", lambda ctx: [])
    ctx = SimpleNamespace(recipe=recipe, problems=lambda split: [], seed=lambda *parts: 3, dir=tmp_path, rank=0)
    made = train_reviser.train(ctx)
    assert not made["trained"] and made["trajectories"] == 0
    assert made["why"].startswith("0 trajectories to train on (reviser.min_examples 16)")


PLAIN = ["prompts.chat=false", "prompts.stop=[]", "prm.labels=['+', '-']", "engine.max_model_len=512"]


@pytest.mark.parametrize(
    "targets, said",
    [
        ("[q_proj, query_key_value]", "has no 'query_key_value'; it has .*q_proj"),
        ("attention", "has no 'attention'"),
        ("[input_layernorm]", "has no 'input_layernorm'"),
    ],
)
def test_lora_targets_that_the_model_does_not_have_are_named_with_its_own(targets, said, tmp_path):
    base = families.model("smollm2", tmp_path)
    recipe = [*PLAIN, f"model.base={base}"]
    with pytest.raises(UserError, match=f"model.lora_targets: .*{said}"):
        preflight(load("recipes/chain.yaml", [*recipe, f"model.lora_targets={targets}"]))
    for good in ("all-linear", "[q_proj, v_proj]", r"'.*\.mlp\..*_proj'"):
        preflight(load("recipes/chain.yaml", [*recipe, f"model.lora_targets={good}"]))


def test_a_tokenizer_without_an_end_token_is_refused_and_a_slower_judge_is_announced(tmp_path, capsys):
    recipe = [*PLAIN, f"model.base={families.model('granite', tmp_path)}"]
    preflight(load("recipes/chain.yaml", recipe))
    assert "has logits_scaling: its PRMs score by label log-probabilities" in capsys.readouterr().out
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None}))
    with pytest.raises(UserError, match=r"model.base: .*no EOS token.*eos_token in tokenizer_config.json"):
        preflight(load("recipes/chain.yaml", recipe))


@pytest.mark.parametrize("file", ["chat_template.jinja", "merges.txt", "vocab.bpe", "tokenizer.json", "config.json"])
def test_every_file_of_a_tokenizer_is_in_the_fingerprint(file, tmp_path):
    recipe = load("recipes/chain.yaml", [f"model.base={families.model('gemma2', tmp_path)}"])
    (tmp_path / "merges.txt").touch()
    before = source_files(recipe)
    with open(tmp_path / file, "a") as other:
        other.write(" ")
    after = source_files(recipe)
    assert {key for key in after if after[key] != before.get(key)} == {f"model.base/{file}"}


class Reader:
    """Calibration trials as a run has them: one question a bin."""

    def __init__(self, rows: dict[tuple[int, object], tuple[bool, int]]):
        self.rows = [
            Trial(f"q{b}", b, strategy.n, strategy, right, 0, tokens) for (b, strategy), (right, tokens) in rows.items()
        ]

    def read(self, kind, stage, round):
        assert (kind, stage, round) == (Trial, "calibrate", 1)
        return iter(self.rows)


def test_beam_is_compared_at_equal_answers_and_at_equal_tokens():
    beam, few, many = Beam(4, 2), BestOfN(4), BestOfN(16)
    rows = {(b, few): (b == 1, 100) for b in range(1, 6)} | {(b, many): (b <= 2, 400) for b in range(1, 6)}
    rows |= {(b, beam): (b in (1, 5), 200) for b in range(1, 6)}
    found = beam_over_best_of_n([Reader(rows), Reader(rows)])
    same, paid = found["beam:4:2, equal N"], found["beam:4:2, equal tokens"]
    assert {b: same[f"bin {b}"][0] for b in range(1, 6)} == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1}
    # 200 tokens lie halfway between 100 and 400 on the logarithm: bin 2 is half right by best-of-N
    assert {b: paid[f"bin {b}"][0] for b in range(1, 6)} == {1: 0, 2: -0.5, 3: 0, 4: 0, 5: 1}
    assert same["bins 3-5"][0] == pytest.approx(1 / 3, abs=1e-3) and same["all"][0] == pytest.approx(0.2)


def test_a_beam_dearer_than_every_best_of_n_is_compared_at_equal_answers_only():
    rows = {
        (b, s): (True, cost)
        for b in range(1, 6)
        for s, cost in ((Beam(4, 2), 900), (BestOfN(4), 100), (BestOfN(16), 400))
    }
    assert set(beam_over_best_of_n([Reader(rows)])) == {"beam:4:2, equal N"}


@pytest.mark.parametrize("said, found", [(None, None), ("policy", "adapter of policy_1")])
def test_a_training_begins_where_its_recipe_says(said, found):
    asked = []
    ctx = SimpleNamespace(
        **{"round": 2, "recipe": SimpleNamespace(model=None), "dir": None, "ledger": None, "progress": None},
        seed=lambda *parts: 3,
        model=lambda role, round: asked.append((role, round)) or ModelRef("policy_1", "base", "adapter of policy_1"),
    )
    assert job(ctx, TrainSpec(start=said), "last", Role.POLICY).start == found
    assert asked == ([(Role.POLICY, 1)] if said else [])
