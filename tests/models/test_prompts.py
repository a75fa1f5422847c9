"""Prompts and ends of solutions in the formats of several families."""

from __future__ import annotations

import pytest

from flywheel.models.prompts import Prompts, after_solution
from flywheel.models.steps import Reader
from flywheel.recipe import PromptSpec, RecipeError, load
from flywheel.records import Finish, Question
from tests import families

CHAT = PromptSpec(chat=True, solve="{question}", check="Check {question}", answer=r"Answer (\d+)")
PLAIN = PromptSpec(solve="Q {question}\n", check="Check {question}\n", again="\nAgain\n", answer=r"Answer (\d+)")
QUESTION = Question("q", "3 and 5")
TEMPLATED = [name for name, family in families.FAMILIES.items() if family.template]
ENDS = {
    "llama3": "<|eot_id|>",
    "gemma2": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "mistral": "</s>",
    "phi3": "<|end|>",
    "smollm2": "<|im_end|>",
    "granite": "<|end_of_text|>",
}


@pytest.mark.parametrize("name", TEMPLATED)
def test_a_solution_in_a_chat_ends_as_the_template_ends_the_turn(name):
    tokenizer = families.tokenizer(name)
    reader = Reader(tokenizer, CHAT)
    assert tokenizer.decode([reader.eos]) == ENDS[name]
    # an engine stops at the tokenizer's EOS by itself, and at others if it is told to
    assert (reader.eos in reader.stop) == (ENDS[name] != tokenizer.eos_token)
    text = tokenizer.encode("3 then 5\nAnswer 0", add_special_tokens=False)
    read = reader.solution([*text, reader.eos], Finish.STOP, id="s", question_id="q", purpose="x", model="m")
    assert (read.answer == "0" and read.tokens == tuple(text)) or ENDS[name] == tokenizer.eos_token


@pytest.mark.parametrize("name", TEMPLATED)
def test_a_left_out_again_is_the_conversation_that_the_template_writes(name):
    tokenizer = families.tokenizer(name)
    reader, prompts = Reader(tokenizer, CHAT), Prompts(CHAT, tokenizer)
    tokens = tokenizer.encode("Answer 0", add_special_tokens=False)
    first = reader.solution(tokens, Finish.STOP, id="s", question_id="q", purpose="x", model="m")
    asked = [
        {"role": "user", "content": "3 and 5"},
        {"role": "assistant", "content": "Answer 0"},
        {"role": "user", "content": "That may be wrong. Try again."},
    ]
    whole = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    if name == "mistral":  # its template writes a space before a solution, which a model makes itself, or does not
        whole = whole.replace(" Answer 0", "Answer 0")
    assert tokenizer.decode(prompts.revise(QUESTION, [first])) == whole


def test_the_derived_again_is_what_the_qwen_recipe_wrote_by_hand():
    written = load("recipes/qwen25_05b_gsm8k.yaml").prompts
    found = after_solution(written, families.tokenizer("qwen2.5"), "That may be wrong. Try again.")
    assert found == written.again
    with pytest.raises(RecipeError, match="prompts.again: missing"):
        load("recipes/chain.yaml", ["prompts.again=null"])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_plain_prompt_begins_with_bos_if_the_tokenizer_puts_it_there(name):
    tokenizer, adds = families.tokenizer(name), families.FAMILIES[name].bos is not None
    prompt = Prompts(PLAIN, tokenizer).solve(QUESTION)
    assert prompt == tokenizer("Q 3 and 5\n").input_ids
    assert (prompt[0] == tokenizer.bos_token_id) == adds
    assert Reader(tokenizer, PLAIN).eos == tokenizer.eos_token_id
    if families.FAMILIES[name].template:  # the template's own BOS is the only one
        assert Prompts(CHAT, tokenizer).solve(QUESTION).count(tokenizer.bos_token_id) == bool(
            families.FAMILIES[name].bos
        )


def spec(**changes) -> PromptSpec:
    return CHAT.model_copy(update=changes)


def test_variables_of_the_template_reach_it():
    tokenizer = families.tokenizer("qwen3")
    thinking, not_thinking = (
        tokenizer.decode(Prompts(spec(chat_template_kwargs=given), tokenizer).solve(QUESTION))
        for given in ({}, {"enable_thinking": False})
    )
    assert not_thinking == thinking + "<think>\n\n</think>\n\n"


def test_a_template_that_writes_today_s_date_is_refused_until_the_date_is_fixed():
    tokenizer = families.tokenizer("llama3")
    tokenizer.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today Date: {{ date_string }}\n" + tokenizer.chat_template
    )
    with pytest.raises(ValueError, match="prompts.chat_template_kwargs: .*today's date"):
        Prompts(CHAT, tokenizer)
    fixed = Prompts(spec(chat_template_kwargs={"date_string": "26 Jul 2024"}), tokenizer)
    assert "Today Date: 26 Jul 2024\n" in tokenizer.decode(fixed.solve(QUESTION))


def test_what_a_template_cannot_do_names_the_key():
    with pytest.raises(ValueError, match="^prompts.system: leave it out .*System role not supported"):
        Prompts(spec(system="Be brief."), families.tokenizer("gemma2"))
    with pytest.raises(ValueError, match="^prompts.chat: .* no chat template"):
        Prompts(CHAT, families.tokenizer("gpt_neox"))


def test_another_model_s_markup_is_found():
    again = "<|im_end|>\n<|im_start|>user\nTry again.<|im_end|>\n<|im_start|>assistant\n"
    assert Prompts(spec(again=again), families.tokenizer("qwen2.5")).foreign() == []
    assert Prompts(spec(again=again), families.tokenizer("gemma2")).foreign() == ["<|im_end|>", "<|im_start|>"]
    html = spec(solve="Is 3 < 5 <b>true</b>? [A] {question}", again="<start_of_turn>user\n[INST]")
    assert Prompts(html, families.tokenizer("gemma2")).foreign() == ["[INST]"]
