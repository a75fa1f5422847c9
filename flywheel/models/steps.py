"""The definition of a step: how sampled tokens are split into steps, and where a solution's answer is found.

A step ends with a token whose text contains the separator (e.g. a newline), so a step boundary is
always a token boundary, even in BPE vocabularies, where the separator may be the end of a longer
token. Sampled token ids are kept; text is never tokenized again.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence

from flywheel.models.engine import Completion, Sampling
from flywheel.models.prompts import end_token
from flywheel.problems.extract import ANSWERED, NAMED, after_thought, find
from flywheel.recipe import PromptSpec, SampleSpec
from flywheel.records import Finish, Solution, Step


class Reader:
    """Parses sampled tokens into steps and solutions.

    tokenizer: a Hugging Face tokenizer. spec: `step` is the text that ends a step; `answer` a rule by which an answer
    is found, or several in order (see `find` in `problems/extract.py`); `stop` texts end a solution like `eos` (see
    `end_token`), as does a complete step with an answer if `end_at_answer`. What stands before a `</think>` is no
    part of a solution. Raises ValueError if no token contains the separator, or a regular expression of `answer` does
    not have exactly one group.
    """

    def __init__(self, tokenizer, spec: PromptSpec):
        self.tokenizer, self.end_at_answer, separator = tokenizer, spec.end_at_answer, spec.step
        self.rules = (spec.answer,) if isinstance(spec.answer, str) else tuple(spec.answer)
        for rule in self.rules:
            if rule not in NAMED and (groups := re.compile(rule).groups) != 1:
                raise ValueError(f"prompts.answer: {rule!r} needs exactly one group, has {groups}")
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
        special = set(tokenizer.all_special_ids)
        self.ends = frozenset(i for i, text in enumerate(texts) if separator in text and i not in special)
        if not self.ends:
            raise ValueError(f"prompts.step: no token of the vocabulary holds the separator {separator!r}")
        self.blank = frozenset(i for i, text in enumerate(texts) if i not in special and not text.strip())
        single = {text: find_token(tokenizer, text) for text in spec.stop}
        self.stop = frozenset(token for token in single.values() if token is not None)  # stops that are one token
        self.stop_texts = tuple(text for text, token in single.items() if token is None)
        self.window = max(map(len, self.stop_texts), default=0)  # a stop text of several tokens spans at most so many
        self.eos = end_token(spec, tokenizer)
        if self.eos is None:
            raise ValueError(
                f"model.base: {tokenizer.name_or_path}: the tokenizer has no EOS token, so no solution can be taught"
                " to end: name one as eos_token in tokenizer_config.json"
            )
        if self.eos != tokenizer.eos_token_id:
            self.stop |= {self.eos}  # an engine knows only the tokenizer's

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def steps(self, tokens: Sequence[int]) -> tuple[Step, ...]:
        """Split `tokens` after every token that ends a step; a rest without such a token is a step too.

        A thought, up to `</think>`, is no step: no PRM judges it, no rollout starts in it, no training text holds it.
        """
        tokens = self.after_thought(tokens)
        cuts = [i + 1 for i, token in enumerate(tokens) if token in self.ends]
        if not cuts or cuts[-1] != len(tokens):
            cuts.append(len(tokens))
        pieces = [tuple(tokens[a:b]) for a, b in zip([0, *cuts], cuts) if b > a]
        return tuple(Step(self.text(piece), piece) for piece in pieces)

    def stopped(self, tokens: Sequence[int]) -> int:
        """The number of final tokens that hold a stop text; 0 if `tokens` do not end in one."""
        if tokens and tokens[-1] in self.stop:
            return 1
        if self.stop_texts and self.text(tokens[-self.window :]).endswith(self.stop_texts):
            return next(k for k in range(1, self.window + 1) if self.text(tokens[-k:]).endswith(self.stop_texts))
        return 0

    @property
    def done(self) -> Callable[[Sequence[int]], bool] | None:
        """What an engine asks after each token (see `Sampling.done`): None if single tokens end every solution."""
        return self.finished if self.end_at_answer or self.stop_texts else None

    def sampling(self, spec: SampleSpec) -> Sampling:
        """Sampling parameters for a whole solution."""
        named = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"}
        return Sampling(stop=self.stop, done=self.done, **spec.model_dump(include=named))

    def finished(self, tokens: Sequence[int]) -> bool:
        """Whether a solution whose text, or last part of whole steps, is `tokens` ends here."""
        return bool(self.stopped(tokens)) or (self.end_at_answer and self._answered(tokens))

    def _answered(self, tokens: Sequence[int]) -> bool:
        """Whether `tokens` end with a complete step that holds an answer, and no thought is open."""
        if not tokens or tokens[-1] not in self.ends:
            return False
        last = next((i for i in range(len(tokens) - 1, 0, -1) if tokens[i - 1] in self.ends), 0)
        return self.answer(self.text(tokens[last:])) is not None and bool(after_thought(self.text(tokens)))

    def trim(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """`tokens` without a final stop text and without the blank tokens before it."""
        end = len(tokens) - self.stopped(tokens)
        while end and tokens[end - 1] in self.blank:
            end -= 1
        return tuple(tokens[:end])

    def answer(self, text: str) -> str | None:
        """The final answer in `text`, stripped, by the first rule that finds one; None if none does."""
        return find(text, self.rules)

    def after_thought(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """`tokens` after the last `</think>` and the blank tokens that follow it; all of them if there is none."""
        tokens = tuple(tokens)
        thoughts = self.text(tokens).count(ANSWERED)
        if not thoughts:
            return tokens
        start = bisect_left(range(len(tokens)), thoughts, key=lambda end: self.text(tokens[:end]).count(ANSWERED))
        while start < len(tokens) and tokens[start] in self.blank:
            start += 1
        return tokens[start:]

    def ended(self, step: Completion, before: Sequence[int] = ()) -> bool:
        """Whether a solution ends with this step, sampled alone after `before`: by EOS, a stop text, or its answer."""
        tokens = [*before, *step.tokens]
        return step.eos or bool(self.stopped(tokens)) or (self._answered(step.tokens) and self._answered(tokens))

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
        """Parse `tokens` as a solution, which begins after a thought. `draw` defaults to `id`.

        `answer` is None unless `finish` is STOP; the steps end with the one that completes it.
        """
        steps = self.steps(self.trim(tokens))
        answer = self.answer("".join(step.text for step in steps)) if finish is Finish.STOP else None
        while answer and len(steps) > 1 and self.answer("".join(step.text for step in steps[:-1])) == answer:
            steps = steps[:-1]  # what comes after the answer is never judged or trained on
        unread = len(tokens) - sum(len(step.tokens) for step in steps)
        return Solution(id, question_id, steps, finish, answer, purpose, model, draw or id, parent, attempt, unread)


def one_token(tokenizer, word: str, key: str) -> int:
    """The id of `word` as a single token, alone or after a space. Raises ValueError naming the recipe's `key`."""
    if (token := find_token(tokenizer, word)) is None:
        raise ValueError(f"{key}: {word!r} is not a single token of this tokenizer; choose a word that is one")
    return token


def find_token(tokenizer, word: str) -> int | None:
    """The id of `word` as a single token, alone or after a space; None if it is none."""
    for text in (word, " " + word):
        try:
            ids = tokenizer.encode(text, add_special_tokens=False)
        except Exception:  # a word-level vocabulary without an unknown token raises a bare Exception
            continue
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
    return None
