"""Where a sampled solution ends: at its answer, at a stop text of one or several tokens, at EOS."""

from __future__ import annotations

import pytest
from characters import characters

from flywheel.models.engine import Completion
from flywheel.models.steps import Reader
from flywheel.recipe import PromptSpec
from flywheel.records import Finish

TOKENIZER = characters()


def reader(**changes) -> Reader:
    spec = {"solve": "", "check": "", "again": "", "answer": "Answer: (.+)", "stop": ["\n\n", "Question:", "#"]}
    return Reader(TOKENIZER, PromptSpec(**{**spec, **changes}))


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def ends(made: Reader, text: str) -> int | None:
    """After how many characters `done` ends `text`, asked token by token; None: never."""
    tokens = ids(text)
    return next((i for i in range(1, len(tokens) + 1) if made.done(tokens[:i])), None)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("1 + 1 = 2\nAnswer: 2\nand more", "1 + 1 = 2\nAnswer: 2\n"),  # at the step that holds the answer
        ("Answer: 2", None),  # the line may go on: 2 or 25?
        ("1 + 1 = 2\n\nmore", "1 + 1 = 2\n\n"),  # a stop text of two tokens
        ("1 Question: what", "1 Question:"),
        ("1 Quest", None),
        ("1 # 2", "1 #"),
    ],
)
def test_a_solution_ends_at_its_answer_or_at_a_stop_text(text, at):
    assert ends(reader(), text) == (at and len(at))


def test_a_solution_may_go_on_after_its_answer():
    made = reader(end_at_answer=False)
    assert ends(made, "Answer: 2\nmore") is None
    assert ends(made, "Answer: 2\nmore\n\n") == len("Answer: 2\nmore\n\n")
    assert reader(end_at_answer=False, stop=["#"]).done is None  # the engine knows tokens by itself


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("1 + 1 = 2\nAnswer: 2\nIs that so?\n", "1 + 1 = 2\nAnswer: 2\n"),
        ("Answer: 3\nNo.\nAnswer: 2\nYes.\n", "Answer: 3\nNo.\nAnswer: 2\n"),
        ("1 + 1 = 2\n2\n", "1 + 1 = 2\n2\n"),
    ],
)
def test_what_comes_after_the_answer_is_no_part_of_the_solution(text, kept):
    made = reader(end_at_answer=False).solution(
        ids(text), Finish.STOP, id="s", question_id="q", purpose="sample", model="m"
    )
    assert made.text.rstrip() == kept.rstrip() and made.generated == len(text)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("1 = 1\nQuestion:", "1 = 1"), ("1 = 1\n\n", "1 = 1"), ("1 = 1#", "1 = 1"), ("1 = 1\n2", "1 = 1\n2")],
)
def test_a_stop_text_is_no_part_of_the_solution(text, kept):
    assert TOKENIZER.decode(reader().trim(ids(text))) == kept


def test_a_step_sampled_alone_sees_a_stop_text_that_began_before_it():
    step = Completion(tuple(ids("\n")), Finish.STOP, False)
    assert reader().ended(step, before=ids("1 = 1\n")) and not reader().ended(step, before=ids("1 = 1"))
    answer = Completion(tuple(ids("Answer: 7\n")), Finish.STOP, False)
    assert reader().ended(answer) and reader(end_at_answer=False).ended(answer)  # beam search ends at an answer anyway


def test_the_answer_of_a_cut_line_is_not_read():
    named = {"id": "s", "question_id": "q", "purpose": "sample", "model": "m"}
    assert reader().solution(ids("Answer: 2"), Finish.LENGTH, **named).answer is None
    assert reader().solution(ids("Answer: 25\n"), Finish.STOP, **named).answer == "25"


@pytest.mark.parametrize(
    ("rules", "text", "answer"),
    [
        ("boxed", "so \\fbox{42}", "42"),
        ("boxed", "it is \\boxed {42}.", "42"),
        ("boxed", "it is $\\boxed 9$.", "9"),
        ("boxed", "\\boxed{1}, no: \\boxed{2}", "2"),
        ("boxed", "\\boxed{1}, no: \\boxed{}", None),
        ("boxed", "\\boxed{1}, \\boxed{2} or \\boxed{3}", None),  # guesses
        ("boxed", "\\boxed{1}, no: \\boxed{2}, yes: \\boxed{2}", "2"),
        ("boxed", "#### 18", None),
        (["boxed", "hashes"], "#### 18", "18"),
        (["boxed", "hashes", "answer_is"], "The answer is 18.", "18"),
        (["boxed", "answer_is"], "The answer is 18.\nor \\boxed{17}", "17"),
        ("hashes", "#### 18 The answer is 18.", "18"),
        ("hashes", "#### \\$1,080.50\nwell", "\\$1,080.50"),
        ("hashes", "####-5<|im_end|>", "-5"),
        ("hashes", "#### 3 and 4", "3 and 4"),  # no number alone, so the whole line
        ("hashes", "#### 3/4", "3/4"),
        ("hashes", "#### x + 1", "x + 1"),
        ("answer_is", "**Answer:** 4", "4"),
        ("answer_is", "Answer is 18", "18"),
        ("answer_is", "The final answer is 2.5. I hope it is right.", "2.5"),
        ("answer_is", "no answer here", None),
        (["answer_is", "= (\\d+)"], "1 + 1 = 2", "2"),
        ("boxed", "<think>\\boxed{3}</think> it is \\boxed{4}", "4"),
        ("boxed", "<think>\\boxed{3}</think> it is four", None),  # a box in a thought is no answer
        ("boxed", "\\boxed{3}</think> it is four", None),  # a template may write <think> into the prompt
        ("boxed", "<think> perhaps \\boxed{3}", None),
    ],
)
def test_an_answer_is_found_by_the_first_rule_that_finds_one(rules, text, answer):
    assert reader(answer=rules).answer(text) == answer


def test_a_thought_is_no_step_and_does_not_end_a_solution():
    made = reader(answer="boxed", stop=[])
    text = "<think>\n1 + 1\n\\boxed{3}\n</think>\n\n1 + 1 = 2\n\\boxed{2}\n"
    assert [step.text for step in made.steps(ids(text))] == ["1 + 1 = 2\n", "\\boxed{2}\n"]
    solution = made.solution(ids(text), Finish.STOP, id="s", question_id="q", purpose="sample", model="m")
    assert solution.text == "1 + 1 = 2\n\\boxed{2}" and solution.answer == "2"
    assert solution.generated == len(ids(text)) > len(solution.tokens)  # what a thought costs is charged
    assert ends(made, text) == len(text)
    thought = Completion(tuple(ids("\\boxed{3}\n")), Finish.STOP, False)
    assert made.ended(thought) and not made.ended(thought, before=ids("<think>\n"))


def test_a_rule_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"prompts\.answer: 'Answer' needs exactly one group"):
        reader(answer=["boxed", "Answer"])
