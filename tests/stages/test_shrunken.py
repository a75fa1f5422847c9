"""Claims about the shrunken published architecture on which the Qwen recipe is run."""

import random

import pytest

from data import shrunken
from flywheel import recipe
from flywheel.models.prompts import Prompts
from flywheel.models.steps import Reader, one_token
from flywheel.problems import sources as problems
from flywheel.problems.grading import Grader
from flywheel.records import Finish, Split, Verdict


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("shrunken")
    shrunken.build(out, questions=40, steps=2)
    return out


def open_model(out):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = recipe.load(out / "recipe.yaml")
    return (
        made,
        AutoTokenizer.from_pretrained(made.model.base),
        AutoModelForCausalLM.from_pretrained(made.model.base).eval(),
    )


def test_a_planted_solution_ends_in_the_answer_of_its_problem():
    rng = random.Random(0)
    for problem in shrunken.distinct(rng, 200):
        lines = problem.solution().split("\n")
        assert len(lines) == len(problem.changes) + 1 and lines[-1] == f"The answer is \\boxed{{{problem.answer}}}."
        value = problem.start
        for line in lines[:-1]:
            left, result = line.removesuffix(".").split(" = ")
            assert left.startswith(f"{value} ") and eval(left) == int(result)
            value = int(result)
    slips = [problem.solution(rng) != problem.solution() for problem in shrunken.distinct(rng, 500)]
    assert 0.1 < sum(slips) / len(slips) < 0.4


def test_what_is_built_loads_as_the_recipe_of_a_published_model(built):
    made, tokenizer, model = open_model(built)
    full = recipe.load(shrunken.RECIPE)
    assert made.prompts == full.prompts and made.prm.labels == full.prm.labels and made.problems.answer == "#### (.+)"
    assert model.config.model_type == "qwen2" and sum(p.numel() for p in model.parameters()) < 1_000_000
    found = problems.load(made.problems)
    assert sum(map(len, found.values())) == 50 and all(found.values())
    assert one_token(tokenizer, "+", "prm.labels") != one_token(tokenizer, "-", "prm.labels")
    assert tokenizer.decode(tokenizer.eos_token_id) == "<|im_end|>"


def test_a_planted_text_is_cut_into_its_lines_with_steps_that_end_inside_bpe_tokens(built):
    made, tokenizer, _ = open_model(built)
    reader, prompts = (Reader(tokenizer, made.prompts), Prompts(made.prompts, tokenizer))
    problem = problems.load(made.problems)[Split.TRAIN][0]
    prompt = prompts.solve(problem.question)
    assert tokenizer.decode(prompt).endswith("on the last line.<|im_end|>\n<|im_start|>assistant\n")
    text = "3 + 4 = 7.\n7 - 2 = 5.\nThe answer is \\boxed{5}."
    solution = reader.solution(
        tokenizer.encode(text), Finish.STOP, id="s", question_id=problem.id, purpose="test", model="test"
    )
    assert [step.text for step in solution.steps] == text.splitlines(keepends=True) and solution.answer == "5"
    assert tokenizer.decode(solution.steps[0].tokens[-1]) == ".\n"
    _, reads = prompts.check(problem.question, solution.steps)
    assert len(reads) == 3
    assert tokenizer.decode(prompts.revise(problem.question, [solution])).count("<|im_start|>assistant") == 2


@pytest.mark.slow
def test_the_trained_model_is_right_often_but_not_always(tmp_path):
    import torch

    shrunken.build(tmp_path)
    made, tokenizer, model = open_model(tmp_path)
    reader, prompts = Reader(tokenizer, made.prompts), Prompts(made.prompts, tokenizer)
    torch.manual_seed(0)
    pairs = []
    for problem in problems.load(made.problems)[Split.TRAIN][:60]:
        prompt = prompts.solve(problem.question)
        for i, row in enumerate(
            model.generate(
                torch.tensor([prompt] * 8), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=64
            ).tolist()
        ):
            tokens = row[len(prompt) :]
            ended = tokenizer.eos_token_id in tokens
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)] if ended else tokens
            finish = Finish.STOP if ended else Finish.LENGTH
            pairs.append(
                (
                    problem,
                    reader.solution(
                        tokens, finish, id=f"{problem.id}/{i}", question_id=problem.id, purpose="test", model="test"
                    ),
                )
            )
    with Grader(made.problems) as grader:
        grades = grader.verdicts(pairs)
    assert 0.2 <= sum(grade.correct for grade in grades) / len(grades) <= 0.7
    assert sum(grade.verdict in (Verdict.CORRECT, Verdict.INCORRECT) for grade in grades) >= 0.97 * len(grades)
    assert sum(len(solution.steps) >= 3 for _, solution in pairs) >= 0.9 * len(pairs)
