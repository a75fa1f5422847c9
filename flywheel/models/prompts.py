"""The prompts of policy, reviser and PRM as token ids; solutions are inserted as their sampled ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from flywheel.errors import UserError, first_line
from flywheel.recipe import ExampleSpec, PromptSpec
from flywheel.records import Question, Solution, Step

AGAIN = "That may be wrong. Try again."  # the user's turn between two attempts, if `prompts.again` is left out
MARKUP = re.compile(r"<\|[^\s<>|]+\|>|</?[a-z]+(?:_[a-z]+)+>|</?s>|<[be]os>|\[/?INST\]")  # of chat formats


class Prompts:
    """The prompts of the three roles for one tokenizer.

    With `prompts.chat`, the filled template is the user's turn of the tokenizer's chat template and
    the solution is the assistant's; otherwise both are plain text, after BOS if the tokenizer puts it before texts.
    Raises ValueError if the chat template is missing, refuses the turns, or writes today's date.
    """

    def __init__(self, spec: PromptSpec, tokenizer):
        self.spec, self.tokenizer = spec, tokenizer
        self._bos = [id for id in tokenizer("").input_ids if id == tokenizer.bos_token_id][:1]
        if spec.chat:
            _check_template(spec, tokenizer)
        again = after_solution(spec, tokenizer, AGAIN) if spec.again is None else spec.again
        self._again = self._encode(again)

    def _encode(self, text: str) -> list[int]:
        """Raises UserError if the tokenizer has no token for a part of `text`, as a word-level one may."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # what the library `tokenizers` raises has no other type
            raise UserError(f"the model's tokenizer cannot write {text!r}: {first_line(error)}") from None

    def _head(self, template: str, question: Question, examples: Sequence[ExampleSpec] = ()) -> list[int]:
        asked = [(template.replace("{question}", shown.question), shown.solution) for shown in examples]
        text = template.replace("{question}", question.text)
        if not self.spec.chat:
            shown = "".join(f"{before}{solution}\n\n" for before, solution in asked)
            return [*self._bos, *self._encode(shown + text)]
        return self._encode(render(self.spec, self.tokenizer, *(turn for pair in asked for turn in pair), text))

    def solve(self, question: Question, bare: bool = False) -> list[int]:
        """The prompt for a first attempt. The `bare` base is shown the `prompts.examples` of the question's level.

        If no example is of that level, it is shown those without a level.
        """
        examples = [e for e in self.spec.examples if bare and e.level == question.level]
        examples = examples or [e for e in self.spec.examples if bare and not e.level]
        return self._head(self.spec.solve, question, examples)

    def revise(self, question: Question, attempts: Sequence[Solution]) -> list[int]:
        """The prompt for the attempt after `attempts` (oldest first); equals `solve` if there are none."""
        ids = self.solve(question)
        for attempt in attempts:
            ids += [*attempt.tokens, *self._again]
        return ids

    def check(self, question: Question, steps: Sequence[Step]) -> tuple[list[int], list[int]]:
        """(tokens, reads): the PRM's input ids, and for each step the length of the prefix at which its value is read.

        The PRM predicts a label in place of the separator that ends the step: if the separator is
        a token by itself, it is not part of that prefix.
        """
        ids, reads = self._head(self.spec.check, question), []
        for step in steps:
            tokens = list(step.tokens)
            closing = 1 if len(tokens) > 1 and self._is_separator(tokens[-1]) else 0
            reads.append(len(ids) + len(tokens) - closing)
            ids += tokens
        return ids[: reads[-1]] if reads else ids, reads

    def _is_separator(self, token: int) -> bool:
        return not self.tokenizer.decode([token]).strip()

    def foreign(self) -> list[str]:
        """What looks like a special token in `prompts`, but is none of this tokenizer: probably another model's."""
        spec = self.spec
        texts = [spec.system, spec.solve, spec.check, spec.again, *(e.solution for e in spec.examples)]
        found = dict.fromkeys(word for text in texts for word in MARKUP.findall(text or ""))
        return [word for word in found if len(self._encode(word)) != 1]


def render(spec: PromptSpec, tokenizer, *turns: str, answer: bool = True, **more: Any) -> str:
    """The chat template's text of turns that alternate between user and assistant, after `prompts.system`.

    `answer`: whether the header of the assistant's next turn follows. `more`: variables of the template beside
    `prompts.chat_template_kwargs`.
    """
    messages = [{"role": "system", "content": spec.system}] if spec.system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer, **spec.chat_template_kwargs, **more
    )


def after_solution(spec: PromptSpec, tokenizer, *turns: str) -> str:
    """What the chat template writes after a solution and its next `turns`; after none, only what ends the turn."""
    return render(spec, tokenizer, "Question", "Solution", *turns, answer=bool(turns)).rpartition("Solution")[2]


def end_token(spec: PromptSpec, tokenizer) -> int | None:
    """The token that ends a solution: with `prompts.chat` the template's after an assistant's turn, else EOS."""
    if spec.chat:
        ids = tokenizer.encode(after_solution(spec, tokenizer).lstrip(), add_special_tokens=False)
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            return ids[0]
    return tokenizer.eos_token_id


def _check_template(spec: PromptSpec, tokenizer) -> None:
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ValueError(f"prompts.chat: the tokenizer of {name} has no chat template: say `chat: false`")
    try:
        first, second = (
            render(spec, tokenizer, "Question", strftime_now=lambda format, day=day: day)
            for day in ("today", "tomorrow")
        )
    except Exception as error:  # whatever the template raises, jinja2's errors among them
        key = "prompts.system: leave it out and put its text into prompts.solve" if spec.system else "prompts.chat"
        raise ValueError(f"{key}: the chat template of {name} says: {error}") from None
    if first != second:
        raise ValueError(
            f"prompts.chat_template_kwargs: the chat template of {name} writes today's date into the prompt, so a model"
            " would be asked otherwise every day: fix the date, e.g. {date_string: 26 Jul 2024}, or set prompts.system,"
            " whichever the template heeds"
        )
