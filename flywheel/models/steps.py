"""The definition of a step: how sampled tokens are split into steps, and where a solution's answer is found.

A step ends with a token whose text contains the separator (e.g. a newline), so a step boundary is
always a token boundary, even in BPE vocabularies, where the separator may be the end of a longer
token. Sampled token ids are kept; text is never tokenized again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from flywheel.models.engine import Completion
from flywheel.problems.grading import last_boxed
from flywheel.records import Finish, Solution, Step


class Reader:
    """Parses sampled tokens into steps and solutions.

    tokenizer: a Hugging Face tokenizer. separator: the text that ends a step. answer: a regular
    expression whose one group is the final answer, or `boxed` for the last \\boxed{...}. stop: words,
    each a single token, that end a solution like EOS.
    Raises ValueError if no token contains the separator, a stop word is not a single token, or
    `answer` does not have exactly one group.
    """

    def __init__(self, tokenizer, separator: str, answer: str, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.pattern = None if answer == "boxed" else re.compile(answer)
        if self.pattern and self.pattern.groups != 1:
            raise ValueError(f"prompts.answer: {answer!r} needs exactly one group, has {self.pattern.groups}")
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
        special = set(tokenizer.all_special_ids)
        self.ends = frozenset(i for i, text in enumerate(texts) if separator in text and i not in special)
        if not self.ends:
            raise ValueError(f"prompts.step: no token of the vocabulary holds the separator {separator!r}")
        self.blank = frozenset(i for i, text in enumerate(texts) if i not in special and not text.strip())
        self.stop = frozenset(one_token(tokenizer, name, "prompts.stop") for name in stop)
        self.eos = tokenizer.eos_token_id

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def steps(self, tokens: Sequence[int]) -> tuple[Step, ...]:
        """Split `tokens` after every token that ends a step; a rest without such a token is a step too."""
        cuts = [i + 1 for i, token in enumerate(tokens) if token in self.ends]
        if not cuts or cuts[-1] != len(tokens):
            cuts.append(len(tokens))
        pieces = [tuple(tokens[a:b]) for a, b in zip([0, *cuts], cuts) if b > a]
        return tuple(Step(self.text(piece), piece) for piece in pieces)

    def trim(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """`tokens` without a final stop token and without the blank tokens before it."""
        end = len(tokens)
        if end and tokens[end - 1] in self.stop:
            end -= 1
        while end and tokens[end - 1] in self.blank:
            end -= 1
        return tuple(tokens[:end])

    def answer(self, text: str) -> str | None:
        """The final answer in `text`: the last match, stripped; None if there is none or it is empty."""
        if self.pattern is None:
            return last_boxed(text)
        found = self.pattern.findall(text)
        return found[-1].strip() or None if found else None

    def ended(self, completion: Completion) -> bool:
        """Whether the solution ends with this completion: by EOS, a stop token, or a complete step with an answer."""
        if completion.eos or (completion.tokens and completion.tokens[-1] in self.stop):
            return True
        last = self.steps(completion.tokens)[-1:]
        return bool(last) and last[0].tokens[-1] in self.ends and self.answer(last[0].text) is not None

    def solution(
        self,
        tokens: Sequence[int],
        finish: Finish,
        *,
        id: str,
        question_id: str,
        purpose: str,
        model: str,
        draw: str | None = None,
        parent: str | None = None,
        attempt: int = 1,
    ) -> Solution:
        """Parse `tokens` as a solution. `answer` is None unless `finish` is STOP. `draw` defaults to `id`."""
        steps = self.steps(self.trim(tokens))
        answer = self.answer("".join(step.text for step in steps)) if finish is Finish.STOP else None
        return Solution(id, question_id, steps, finish, answer, purpose, model, draw or id, parent, attempt)


def one_token(tokenizer, word: str, key: str) -> int:
    """The id of `word` as a single token, alone or after a space. Raises ValueError naming the recipe's `key`."""
    for text in (word, " " + word):
        try:
            ids = tokenizer.encode(text, add_special_tokens=False)
        except Exception:  # a word-level vocabulary without an unknown token raises a bare Exception
            continue
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
    raise ValueError(f"{key}: {word!r} is not a single token of this tokenizer; choose a word that is one")
