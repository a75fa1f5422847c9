"""Searches without a model: `Say` answers from a table; engine, driver, ledger, PRM, prompts, reader and the
laboratory's tokenizer above it are the real ones.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from data.chain.tokenizer import build
from flywheel.ledger import Ledger
from flywheel.models.driver import Backend, Output, ServedModel
from flywheel.models.engine import Sampling
from flywheel.models.prm import Prm
from flywheel.models.prompts import Prompts
from flywheel.models.steps import Reader
from flywheel.recipe import PromptSpec, SampleSpec
from flywheel.records import Finish, Question, Role
from flywheel.search.head import Head
from flywheel.search.limit import limited
from flywheel.search.run import search
from flywheel.search.strategy import Searcher

TOKENIZER = build()
SPEC = PromptSpec(
    solve="Q {question} ?\nTry ",
    check="Q {question} ?\nCheck ",
    again="\nAgain ",
    stop=["Again"],
    answer=r"Answer (\S+)",
)
READER = Reader(TOKENIZER, SPEC)
QUESTION = Question("q1", "5 +3 *2")


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


class Say:
    """Deals `lines[what the prompt says after its keyword]` in order, over and over; judges by the last line.

    With a plain list, the lines in order whatever the prompt.
    """

    one_pass = True
    tokens = 0

    def __init__(self, lines: dict[str, list[str]] | list[str] | None = None, values: dict[str, float] | None = None):
        self.lines, self.values = lines or {}, values or {}
        self.dealt: Counter[str] = Counter()
        self.asked: list[str] = []
        self.sampled: list[Sampling] = []
        self.read: list[str] = []  # what the judge was asked to value
        self.waiting: list[tuple[asyncio.Future, Output]] = []

    def submit(self, prompt, ask, adapter) -> asyncio.Future:
        text = TOKENIZER.decode(list(prompt))
        said = text.split("Try" if "Try" in text else "Check", 1)[1].strip(" ")
        self.asked.append(said)
        if isinstance(ask, Sampling):
            self.sampled.append(ask)
            lines, key = (
                (self.lines, "") if isinstance(self.lines, list) else (self.lines.get(said) or self.lines["*"], said)
            )
            drawn = self.drawn(lines[self.dealt[key] % len(lines)], ask)
            self.dealt[key] += 1
        else:
            lines = [
                TOKENIZER.decode(list(prompt[:read])).split("Check", 1)[1].strip().split("\n")[-1] for read in ask.reads
            ]
            self.read += lines
            drawn = Output((), Finish.LENGTH, False, values=tuple(self.values[line] for line in lines))
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((future, drawn))
        return future

    def drawn(self, line: str, ask: Sampling) -> Output:
        tokens = ids(line)
        end = next((i + 1 for i, token in enumerate(tokens) if token in ask.stop), None)
        if (end or len(tokens) + 1) > ask.max_tokens:
            return Output(tuple(tokens[: ask.max_tokens]), Finish.LENGTH, False)
        if end:
            return Output(tuple(tokens[:end]), Finish.STOP, False)
        return Output((*tokens, TOKENIZER.eos_token_id), Finish.STOP, True)

    @property
    def sequences(self) -> int:
        return len(self.waiting)

    def step(self) -> bool:
        waiting, self.waiting = self.waiting, []
        for future, drawn in waiting:
            future.set_result(drawn)
        return True

    def close(self) -> None:
        self.waiting = []


class Bench:
    """A searcher over scripted devices, and a ledger."""

    def __init__(
        self, policy=None, values=None, reviser=None, *, head=None, how="last", max_model_len=256, device=Say, **sample
    ):
        self.ledger = Ledger("test", 1)
        self.devices = {Role.POLICY: device(policy), Role.PRM: device(values=values), Role.REVISER: device(reviser)}
        if head:
            self.devices[Role.HEAD] = device(head)
        engines = {
            role: ServedModel(role, f"{role}_1", 10, max_model_len, device, self.ledger)
            for role, device in self.devices.items()
        }
        self.driver = Backend(engines, list(self.devices.values()))
        prompts = Prompts(SPEC, TOKENIZER)
        self.searcher = Searcher(
            engines[Role.POLICY],
            Prm(engines[Role.PRM], prompts, ("ok", "no"), how),
            engines[Role.REVISER],
            prompts,
            READER,
            SampleSpec(**{"max_tokens": 32, **sample}),
            head=Head(engines[Role.HEAD], prompts, 2) if head else None,
        )

    def search(self, strategy, question=QUESTION, tag="t", limit=None):
        searcher = self.searcher if limit is None else limited(self.searcher, limit)
        [outcome] = self.driver.run([question], lambda q: search(strategy, q, searcher, tag=tag))
        return outcome

    def judged(self) -> list[str]:
        return self.devices[Role.PRM].asked


SAMPLES = [
    "5 +3 =8\n8 *2 =16\nAnswer 16",
    "5 +3 =9\n9 *2 =18\nAnswer 18",
    "5 +3 =8\n8 *2 =16\nAnswer 16",
    "5 +3 =9\n9 *2 =18\n",
    "Answer 18 Again",
]
VALUES = {"Answer 16": 0.4, "Answer 18": 0.7, "5 +3 =8": 0.9, "5 +3 =9": 0.3, "8 *2 =16": 0.8, "9 *2 =18": 0.2}
