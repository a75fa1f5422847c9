"""The nouns of the project: frozen dataclasses, standard library only.

Everything that a stage writes to disk is one of these records; everything that a
strategy, a training or a study takes is made of them. `runs/files.py` turns them into
parquet rows and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Split(StrEnum):
    """The four disjoint sets of questions. `TEST` is read by `evaluate` alone."""

    TRAIN = "train"
    CALIBRATE = "calibrate"
    VALIDATION = "validation"
    TEST = "test"


class Role(StrEnum):
    """Which of the three models of a round does the work."""

    POLICY = "policy"
    PRM = "prm"
    REVISER = "reviser"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A frozen base plus at most one LoRA adapter, under the name that every figure quotes.

    With `labels`, the token ids of a good and a bad label, it is asked for `Engine.score` with
    these labels alone, which lets an engine read all prefixes of a text in one pass.
    """

    name: str
    base: str
    adapter: str | None = None
    labels: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """What search may see."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its gold answer. Search never receives one."""

    question: Question
    answer: str
    split: Split
    level: str = ""  # the label that the problem set carries (chain length, MATH level)

    @property
    def id(self) -> str:
        return self.question.id


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a solution, as text and as the very token ids that were sampled.

    `tokens` include the separator that ends the step; the end-of-sequence token is
    never part of a step.
    """

    text: str
    tokens: tuple[int, ...]


class Finish(StrEnum):
    STOP = "stop"  # the model ended its answer
    LENGTH = "length"  # cut off by a limit on tokens, steps or rounds


@dataclass(frozen=True, slots=True)
class Solution:
    """One attempt at a question. A chain of `parent`s is a revision chain.

    `answer` is the extracted final answer (normalised text), or None where none could
    be parsed. `purpose` is what it was drawn for (`sample`, `beam`, `control`), `model` the name of the model that
    wrote it. `draw` names the independent draw that it belongs to: a whole revision chain, or a whole beam search, is
    one.
    """

    id: str
    question_id: str
    steps: tuple[Step, ...]
    finish: Finish
    answer: str | None
    purpose: str
    model: str
    draw: str
    parent: str | None = None
    attempt: int = 1  # position in its revision chain, from 1

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for step in self.steps for token in step.tokens)


class Verdict(StrEnum):
    CORRECT = "correct"
    INCORRECT = "incorrect"
    UNPARSABLE = "unparsable"  # finished, but no answer could be extracted
    TRUNCATED = "truncated"  # cut off before an answer
    UNDECIDED = "undecided"  # the checker ran out of time or died


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one solution. A solution without a Grade is ungraded, not wrong."""

    solution_id: str
    question_id: str
    verdict: Verdict
    purpose: str = ""  # its solution's

    @property
    def correct(self) -> bool:
        return self.verdict is Verdict.CORRECT


@dataclass(frozen=True, slots=True)
class StepValues:
    """The Monte Carlo value in [0, 1] after each step of a solution, from `rollouts[i]` rollouts."""

    solution_id: str
    question_id: str
    values: tuple[float, ...]
    rollouts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SampleScores:
    """The PRM's scores of samples of one question, in their order."""

    question_id: str
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Training text of the reviser: incorrect attempts, then a correct one (Snell et al., 6.1)."""

    question_id: str
    attempts: tuple[Solution, ...]  # the last one is correct; 0-4 incorrect before it


@dataclass(frozen=True, slots=True)
class Difficulty:
    """One question's difficulty. Bins count from 1 (easiest) to 5 (hardest)."""

    question_id: str
    pass_at_1: float
    quantile_bin: int
    fixed_bin: int


@dataclass(frozen=True, slots=True)
class Harvested:
    """One verified trace. `votes`: independent candidates that produced it; `tokens`: its ids."""

    question_id: str
    question: str
    solution: str
    answer: str
    bin: int
    round: int
    votes: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A finished solution inside a search.

    `values`: those of the PRM's step values that the aggregation needs, and `score` what
    they come to; empty and 0 where nothing was scored (no answer, or a majority vote).
    `cost` and `score_cost`: tokens charged to sample and to score this candidate alone;
    0 in beam search, which shares its work, and where an equal solution was scored before.
    """

    solution: Solution
    values: tuple[float, ...] = ()
    score: float = 0.0
    cost: int = 0
    score_cost: int = 0
    cached: int = 0  # of `cost`, what the prefix cache served
    score_cached: int = 0  # of `score_cost`


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a strategy answers for one question: all candidates and the answer selected.

    `answer` is None where no candidate had a parsable answer. `tokens` are all tokens that the strategy was charged for
    (prompt + generated + scored, nominal). `cut_off`: a limit on tokens ended the search.
    """

    question_id: str
    strategy: str
    candidates: tuple[Candidate, ...]
    answer: str | None
    tokens: int
    cached: int = 0  # of `tokens`, what the prefix cache served
    cut_off: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """What one method answered for one test question, whether it was right, and its cost."""

    question_id: str
    method: str
    correct: bool
    tokens: int
