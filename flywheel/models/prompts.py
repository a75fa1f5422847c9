"""Every prompt, as token ids. Solutions are appended as the ids that were sampled."""

from __future__ import annotations

from collections.abc import Sequence

from flywheel.recipe import PromptSpec
from flywheel.records import Question, Solution, Step


class Prompts:
    """The three roles' prompts for one tokenizer.

    With `chat`, templates become the user's turn of the tokenizer's chat template and a
    solution the assistant's; without, they are plain text.
    """

    def __init__(self, spec: PromptSpec, tokenizer):
        self.spec, self.tokenizer = spec, tokenizer
        self._again = self._encode(spec.again)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _head(self, template: str, question: Question) -> list[int]:
        text = template.replace("{question}", question.text)
        if not self.spec.chat:
            return self._encode(text)
        turns = [{"role": "user", "content": text}]
        if self.spec.system:
            turns.insert(0, {"role": "system", "content": self.spec.system})
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self._encode(text)

    def solve(self, question: Question) -> list[int]:
        return self._head(self.spec.solve, question)

    def revise(self, question: Question, attempts: Sequence[Solution]) -> list[int]:
        """The question and earlier attempts, oldest first; an empty list gives `solve`."""
        ids = self.solve(question)
        for attempt in attempts:
            ids += [*attempt.tokens, *self._again]
        return ids

    def check(self, question: Question, steps: Sequence[Step]) -> tuple[list[int], list[int]]:
        """The PRM's text, and for each step the length of the prefix after which its value is read.

        The value stands as the next token after the step, before the separator that ends
        it: where the separator is a token of its own it is not part of that prefix.
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
