"""Properties that hold for anything, tried on whatever Hypothesis comes up with."""

from __future__ import annotations

import copy
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel.ledger import Ledger, total
from flywheel.measure.bins import fixed_bins, quantile_bins
from flywheel.models.steps import Reader
from flywheel.recipe import Loader, PromptSpec, Recipe, RecipeError, known_keys, parse
from flywheel.records import (
    Answered,
    Candidate,
    Difficulty,
    Finish,
    Grade,
    Harvested,
    Outcome,
    Problem,
    Question,
    SampleScores,
    Solution,
    Step,
    StepValues,
)
from flywheel.runs.files import read_table, write_table
from flywheel.search.beam import Beam
from flywheel.search.best_of_n import BestOfN
from flywheel.search.plan import Trial, held_out, most_right
from flywheel.search.revise import Revise
from flywheel.search.select import weighted
from tests import micro

# ---- records and shards ------------------------------------------------------------------

RECORDS = [
    Solution,
    Grade,
    StepValues,
    SampleScores,
    Difficulty,
    Harvested,
    Answered,
    Problem,
    Trial,
    Candidate,
    Outcome,
]
finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.integers(-(2**40), 2**40)
tokens = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)
for kind, made in {
    str: st.text(max_size=20),
    int: numbers,
    float: finite,
    Step: st.builds(Step, st.text(max_size=9), tokens),
    Question: st.builds(Question, st.text(max_size=9), st.text(max_size=30)),
}.items():
    st.register_type_strategy(kind, made)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_records_come_back_from_disk_as_they_went(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "rows.parquet"

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.builds(kind), max_size=5))
    def goes_round(rows):
        write_table(path, rows)
        once = path.read_bytes()
        assert read_table(path, kind) == rows
        write_table(path, rows)
        assert path.read_bytes() == once  # the same records, the same bytes

    goes_round()


# ---- recipes -----------------------------------------------------------------------------

SHIPPED = [
    yaml.load(Path(f"recipes/{name}.yaml").read_text(encoding="utf-8"), Loader)
    for name in ("chain", "chain_lab", "qwen25_05b_gsm8k")
]
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**9),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 9), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SHIPPED),
    st.lists(
        st.tuples(st.one_of(st.sampled_from(known_keys()), st.text(max_size=12)), odd, st.booleans()),
        min_size=1,
        max_size=3,
    ),
)
def test_a_recipe_edited_at_random_is_a_recipe_or_one_clear_line(shipped, edits):
    data = copy.deepcopy(shipped)
    for key, value, remove in edits:
        *path, last = key.split(".")
        place = data
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if isinstance(place, dict):
            if remove:
                place.pop(last, None)
            else:
                place[last] = value
    try:
        assert isinstance(parse(data, "edited.yaml"), Recipe)
    except RecipeError as error:
        assert str(error).startswith("edited.yaml: ") and "\n" not in str(error).strip()


# ---- steps and text ----------------------------------------------------------------------

TOKENIZER = micro.tokenizer()
READER = Reader(TOKENIZER, PromptSpec(solve="", check="", again="", answer=r"Answer (\S+)"))


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30))
def test_steps_are_a_partition_of_the_tokens(ids):
    steps = READER.steps(ids)
    assert [token for step in steps for token in step.tokens] == ids and all(step.tokens for step in steps)
    assert all(token not in READER.ends for step in steps for token in step.tokens[:-1])
    assert all(step.tokens[-1] in READER.ends for step in steps[:-1])
    trimmed = READER.trim(ids)
    assert list(trimmed) == ids[: len(trimmed)] and READER.trim(trimmed) == trimmed
    solution = READER.solution(ids, Finish.STOP, id="s", question_id="q", purpose="", model="")
    assert solution.tokens == trimmed and solution.text == "".join(step.text for step in solution.steps)


# ---- selection, bins ---------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from(["1", "2", "3", None]), st.sampled_from([0.0, 0.25, 0.5, 1.0])), max_size=12),
    st.randoms(),
)
def test_the_order_of_candidates_changes_the_winner_only_between_equals(pairs, chance):
    weight = Counter()
    for answer, score in pairs:
        if answer is not None:
            weight[answer] += score
    shuffled = chance.sample(pairs, len(pairs))
    winners = [weighted([a for a, _ in rows], [s for _, s in rows]) for rows in (pairs, shuffled)]
    assert winners == [None, None] if not weight else all(weight[w] == max(weight.values()) for w in winners)


@given(st.dictionaries(st.text(max_size=4), st.fractions(0, 1).map(float), min_size=1, max_size=40), st.integers(1, 7))
def test_every_question_is_in_one_bin_and_an_easier_one_in_no_harder(rates, count):
    quantile, fixed = quantile_bins(rates, count), fixed_bins(rates, [0.8, 0.6, 0.4, 0.2])
    for found, last in ((quantile, count), (fixed, 5)):
        assert found.keys() == rates.keys() and all(1 <= b <= last for b in found.values())
        order = sorted(rates, key=lambda q: -rates[q])
        assert all(found[a] <= found[b] for a, b in pairwise(order) if rates[a] > rates[b])


# ---- plans, ledger -----------------------------------------------------------------------


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.integers(10, 30), st.integers(1, 5))
def test_what_serves_a_question_was_chosen_without_it(chance, count, bins):
    """Whatever a question's own trials say, the strategies that serve it stay."""
    options = [BestOfN(4), Beam(4, 2), Revise(4)]
    trials = [
        Trial(f"q{q}", 1 + q % bins, 4, s, chance.random() < 0.5, 0, chance.randint(1, 9))
        for q in range(count)
        for s in options
    ]

    def fit(rows):
        return most_right(rows, {}, bins)

    before = {t.question_id: t.strategy for t in held_out(trials, fit)[4]}
    victim = f"q{chance.randrange(count)}"
    changed = [
        Trial(t.question_id, t.bin, t.budget, t.strategy, not t.correct, 0, t.tokens + 7)
        if t.question_id == victim
        else t
        for t in trials
    ]
    after = {t.question_id: t.strategy for t in held_out(changed, fit)[4]}
    assert after[victim] == before[victim] and after.keys() == before.keys() == {t.question_id for t in trials}


charges = st.tuples(
    st.sampled_from(["policy", "prm"]),
    st.sampled_from(["sample", "verify"]),
    st.integers(0, 99),
    st.integers(0, 99),
    st.integers(0, 99),
    st.integers(1, 9),
)


@given(st.lists(charges, max_size=20), st.integers(0, 2**32))
def test_a_ledger_adds_up_in_any_order_and_however_it_is_cut(rows, seed):
    def charged(rows) -> dict:
        ledger, out = Ledger("stage", 1), []
        for i, (role, purpose, prompt, generated, scored, parameters) in enumerate(rows):
            ledger.charge(role, purpose, parameters=parameters, prompt=prompt, generated=generated, scored=scored)
            if i % 3 == 2:
                out += ledger.take()  # a shard is written, and another begins
        return {
            key: (s.prompt, s.generated, s.scored, s.flops) for key, s in total(out + ledger.take(), "role", "purpose")
        }

    whole = charged(rows)
    assert whole == charged(random.Random(seed).sample(rows, len(rows)))
    assert sum(p + g + s for p, g, s, _ in whole.values()) == sum(p + g + s for _, _, p, g, s, _ in rows)
    assert sum(f for *_, f in whole.values()) == sum(2 * n * (p + g + s) for _, _, p, g, s, n in rows)
