"""The prompts of policy, reviser and PRM as token ids; solutions are inserted as their sampled ids."""

from __future__ import annotations

from collections.abc import Sequence

from flywheel.recipe import ExampleSpec, PromptSpec
from flywheel.records import Question, Solution, Step


class Prompts:
    """The prompts of the three roles for one tokenizer.

    With `prompts.chat`, the filled template is the user's turn of the tokenizer's chat template and
    the solution is the assistant's; otherwise both are plain text.
    """

    def __init__(self, spec: PromptSpec, tokenizer):
        self.spec, self.tokenizer = spec, tokenizer
        self._again = self._encode(spec.again)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _head(self, template: str, question: Question, examples: Sequence[ExampleSpec] = ()) -> list[int]:
        asked = [(template.replace("{question}", shown.question), shown.solution) for shown in examples]
        text = template.replace("{question}", question.text)
        if not self.spec.chat:
            return self._encode("".join(f"{before}{solution}\n\n" for before, solution in asked) + text)
        turns = [{"role": "system", "content": self.spec.system}] if self.spec.system else []
        for before, solution in asked:
            turns += [{"role": "user", "content": before}, {"role": "assistant", "content": solution}]
        turns.append({"role": "user", "content": text})
        return self._encode(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

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
