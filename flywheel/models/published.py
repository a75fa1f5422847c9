"""Published PRMs as verifiers: each reads a solution's text in a form of its own, by its own tokenizer.

Each form is that of the model's card:

- `math_shepherd` (peiyi9979/math-shepherd-mistral-7b-prm): `ки` ends a step, and the token after it would be + or -;
- `rlhflow` (RLHFlow/Llama3.1-8B-PRM-Deepseek-Data): each step is a user's turn that the assistant answers by + or -;
- `qwen` (Qwen/Qwen2.5-Math-PRM-7B): one turn, `<extra_0>` ends a step and has two classes;
- `skywork` (Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B): plain text, a value head at the newline that ends a step.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

from flywheel.errors import UserError
from flywheel.models.engine import Engine
from flywheel.models.prm import Prm
from flywheel.models.steps import find_token
from flywheel.models.weights import check_length, load_config, load_tokenizer, value_head
from flywheel.recipe import EngineSpec, PublishedSpec
from flywheel.records import ModelRef, PrmHead, Question, Step
from flywheel.runs.hub import name_of

SHEPHERD_END, QWEN_END = "ки", "<extra_0>"
QWEN_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
QWEN_CLASS = "Qwen2ForProcessRewardModel"
HEADS = {"qwen": PrmHead.CLASSES, "skywork": PrmHead.VALUE}


class Form:
    """How a published PRM reads solutions; takes the place of `Prompts` in a `Prm`.

    Raises UserError, a line that begins with `prm.published`, for a model that is missing or not of the format.
    """

    def __init__(self, spec: PublishedSpec):
        self.spec, self.head = spec, HEADS.get(spec.format)
        try:
            self.tokenizer = load_tokenizer(spec.model)
            if not any(Path(spec.model).glob("*.safetensors")):
                raise ValueError(f"{spec.model} has no *.safetensors (pickled weights are not loaded: convert them)")
            self._check()
            self.labels = (0, 1) if self.head else (self._token("+"), self._token("-"))
        except ValueError as error:
            raise UserError(f"prm.published: {str(error).removeprefix('model.base: ')}") from None

    def _check(self) -> None:
        """Raises ValueError for what the format needs and the model does not have."""
        match self.spec.format:
            case "math_shepherd":
                self._token(SHEPHERD_END)
            case "qwen":
                self._token(QWEN_END)
                if (found := load_config(self.spec.model).architectures) != [QWEN_CLASS]:
                    raise ValueError(f"{self.spec.model} is a {found}, and the format qwen is that of a {QWEN_CLASS}")
            case "skywork":
                value_head(self.spec.model)
        if self.spec.format in ("rlhflow", "qwen") and not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {self.spec.model} has no chat template")

    def _token(self, word: str) -> int:
        if (token := find_token(self.tokenizer, word)) is None:
            raise ValueError(f"{word!r} is not a token of {self.spec.model}, so its format is not {self.spec.format}")
        return token

    @property
    def ref(self) -> ModelRef:
        name = name_of(self.spec.model).rstrip("/").rpartition("/")[2]
        return ModelRef(name, self.spec.model, labels=self.labels, prm_head=self.head)

    def check(self, question: Question, steps: Sequence[Step]) -> tuple[list[int], list[int]]:
        """(tokens, reads), as `Prompts.check`. A blank step is not shown: it has the value of the step before it."""
        texts = [step.text.strip() for step in steps]
        tokens, reads = self._encode(question.text, [text for text in texts if text] or [""])
        return tokens, [reads[max(0, count - 1)] for count in accumulate(map(bool, texts))]

    def _encode(self, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
        match self.spec.format:
            case "math_shepherd":
                ended = [f"{step} {SHEPHERD_END}" for step in steps]
                return self._whole([f"{question} {ended[0]}", *(f"\n{step}" for step in ended[1:])], special=True)
            case "rlhflow":
                # the last answer too: what follows a newline may change how it is cut
                return self._whole([*self._turns([f"{question} {steps[0]}", *steps[1:]]), "+"])
            case "qwen":
                ended = [f"{step}{QWEN_END}" for step in steps]
                asked = [{"role": "system", "content": QWEN_SYSTEM}, {"role": "user", "content": question}]
                return self._whole([self._render(asked) + ended[0], *ended[1:]])
        parts = [f"{self.tokenizer.bos_token or ''}{question}\n", *(part for step in steps for part in (step, "\n"))]
        ids = [self.tokenizer.encode(part, add_special_tokens=False) for part in parts]  # the newline is a token apart
        return list(chain.from_iterable(ids)), list(accumulate(map(len, ids)))[2::2]

    def _whole(self, parts: Sequence[str], special: bool = False) -> tuple[list[int], list[int]]:
        """The tokens of all `parts` as one text, and how many there are up to the end of each part."""
        found = self.tokenizer("".join(parts), add_special_tokens=special, return_offsets_mapping=True)
        ends = [end for _, end in found.offset_mapping]
        return found.input_ids, [bisect_right(ends, end) for end in accumulate(map(len, parts))]

    def _turns(self, turns: Sequence[str]) -> list[str]:
        """The chat up to each of the assistant's answers, of which all before are +, less the chat before it."""
        said, parts, before = [], [], ""
        for turn in turns:
            said.append({"role": "user", "content": turn})
            chat = self._render(said)
            if not chat.startswith(before):
                raise ValueError(f"the chat template of {self.spec.model} changes a turn when others follow it")
            parts.append(chat.removeprefix(before))
            said.append({"role": "assistant", "content": "+"})
            before = chat
        return parts

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


form = functools.cache(Form)  # a tokenizer takes a while to load


class PublishedPrm(Prm):
    """A `Prm` that reads by a `Form`. A step beyond `engine.max_model_len` has the value of the last that fits, or 0.

    Its tokens are not those that `preflight` counts, and a rival must not end a run.
    """

    def __init__(self, engine: Engine, form: Form):
        self.engine, self.prompts, self.labels, self.aggregate = engine, form, form.labels, form.spec.aggregate

    async def values(self, question: Question, steps: Sequence[Step], *, since: int = 0) -> tuple[float, ...]:
        tokens, reads = self.prompts.check(question, steps)
        last = max((read for read in reads if read < self.engine.max_model_len), default=0)
        if not last:
            return (0.0,) * len(reads[since:])
        wanted = [min(read, last) for read in reads[since:]]
        places = sorted(set(wanted))  # steps that share a read share its charge
        values = dict(zip(places, await self._read(question, tokens, places)))
        return tuple(values[read] for read in wanted)


def preflight(spec: PublishedSpec, engine: EngineSpec) -> None:
    """Raises UserError for a model that is missing, not of the format, or shorter than the engines' `max_model_len`."""
    reader = form(spec)
    if reader.head and engine.kind != "vllm":
        raise UserError(f"prm.published: the format {spec.format} is served by engine.kind vllm alone")
    try:
        check_length(spec.model, engine.max_model_len)
        reader.check(Question("preflight", "1"), [Step("1\n", ()), Step("1", ())])
    except Exception as error:  # whatever a chat template raises
        raise UserError(f"prm.published: {error}") from None
