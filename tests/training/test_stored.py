"""Training examples on disk: made once, the same for every rank."""

from __future__ import annotations

from threading import Thread

import pytest
from datasets import Dataset

from flywheel.training import Example, PrmExample, TrainingError
from flywheel.training.examples import rows
from flywheel.training.stored import contents, lengths, stored

SFT = [(f"q{i % 5}", Example(tuple(range(i + 2)), 1)) for i in range(12)]
PRM = [("q0", PrmExample((1, 2, 3), (1, 3), (0.25, 1.0))), ("q1", PrmExample((4,), (1,), (0.1,), (0.5,)))]


def failing():
    raise AssertionError("drawn again")
    yield


@pytest.mark.parametrize("made", [SFT, PRM])
def test_what_is_stored_is_what_a_list_of_the_examples_would_be(made, tmp_path):
    found = stored(tmp_path, 0, iter(made), lambda: {"n": len(made)})
    fit, check = found.split({"q0"})
    for part, held in ((fit, False), (check, True)):
        wanted = Dataset.from_list(rows("", [e for q, e in made if (q == "q0") is held]))
        assert list(part) == list(wanted) and len(part)
        assert lengths(part) == [len(row["input_ids"]) for row in wanted] and contents(part) == contents(wanted)
    assert contents(fit) != contents(check) and found.figures == {"n": len(made)}


def test_examples_are_drawn_once_and_by_rank_0_alone(tmp_path):
    seen = []
    other = Thread(target=lambda: seen.append(stored(tmp_path, 1, failing())))
    other.start()
    first = stored(tmp_path, 0, iter(SFT), lambda: {"n": 12})
    other.join(timeout=60)
    again = stored(tmp_path, 0, failing())
    assert [list(kept.rows) for kept in (*seen, again)] == [list(first.rows)] * 2
    assert seen[0].figures == again.figures == {"n": 12}


def test_what_a_killed_process_left_is_made_again(tmp_path):
    stored(tmp_path, 0, iter(SFT[:3]))
    (tmp_path / "about.json").unlink()
    assert len(stored(tmp_path, 0, iter(SFT)).rows) == 12
    (tmp_path / "about.json").unlink()
    fit, check = stored(tmp_path, 0, iter(())).split({"q0"})
    assert len(fit) == len(check) == 0 and lengths(fit) == []


def test_a_malformed_example_is_named_with_its_question(tmp_path):
    with pytest.raises(TrainingError, match="example of question q7: loss_from 2 leaves nothing to learn"):
        stored(tmp_path, 0, iter([("q7", Example((1, 2), 2))]))
    assert not (tmp_path / "about.json").exists()
