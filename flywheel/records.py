"""The records of the project: frozen dataclasses, standard library only.

Stages write them to disk; strategies, trainings and studies take them as input.
`runs/files.py` converts them to parquet rows and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Split(StrEnum):
    """The four disjoint sets of questions. Only the stages `evaluate` and `search` read `TEST`."""

    TRAIN = "train"
    CALIBRATE = "calibrate"
    VALIDATION = "validation"
    TEST = "test"


class Role(StrEnum):
    """The models of a round."""

    POLICY = "policy"
    PRM = "prm"
    REVISER = "reviser"
    HEAD = "head"  # names a question's difficulty bin


class PrmHead(StrEnum):
    """The head of a published PRM that is no language model any more."""

    CLASSES = "classes"  # two classes by a small network, the second good: Qwen2.5-Math-PRM
    VALUE = "value"  # one number by a linear layer, `v_head`, whose sigmoid is the value: Skywork-o1-Open-PRM


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A frozen base plus at most one LoRA adapter, with the name used in all figures.

    `labels`: token ids of a good and a bad label. If set, the model only serves `Engine.score` with
    these labels, so an engine can score all prefixes of a text in one pass. `prm_head`: what judges in place of the LM
    head in a published PRM; the labels are then its classes.
    """

    name: str
    base: str
    adapter: str | None = None
    labels: tuple[int, int] | None = None
    prm_head: PrmHead | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question without its answer: all that search may see."""

    id: str
    text: str
    level: str = ""  # the problem set's word for its kind or difficulty (chain length, MATH level, task)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its gold answer. Search never receives a Problem."""

    question: Question
    answer: str
    split: Split
    also: tuple[str, ...] = ()  # other accepted answers

    @property
    def id(self) -> str:
        return self.question.id

    @property
    def level(self) -> str:
        return self.question.level


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a solution, as text and as the sampled token ids.

    `tokens` include the separator that ends the step, but never the EOS token.
    """

    text: str
    tokens: tuple[int, ...]


class Finish(StrEnum):
    STOP = "stop"  # the model ended its answer
    LENGTH = "length"  # truncated by a limit on tokens, steps or beam rounds


@dataclass(frozen=True, slots=True)
class Solution:
    """One attempt at a question. Attempts linked by `parent` form a revision chain.

    `answer`: the extracted final answer, or None if none could be parsed. `purpose`: what it was sampled for (`sample`,
    `beam`, `control`). `model`: name of the model that wrote it. `draw`: id of its independent draw; a whole revision
    chain or beam search is one draw. `unread`: tokens generated for it that are in no step: a thought, or
    what came after its answer.
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
    attempt: int = 1  # position in the revision chain, from 1
    unread: int = 0

    @property
    def generated(self) -> int:
        """Tokens that were generated for it, EOS aside."""
        return len(self.tokens) + self.unread

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
    TRUNCATED = "truncated"  # truncated before an answer
    UNDECIDED = "undecided"  # the checker failed, ran out of time or died


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one solution. A solution without a Grade is ungraded, not wrong."""

    solution_id: str
    question_id: str
    verdict: Verdict
    purpose: str = ""  # of the solution
    rule: str = ""  # of problems/equal.py, by which the verdict fell; empty without an answer, or by another checker

    @property
    def correct(self) -> bool:
        return self.verdict is Verdict.CORRECT


@dataclass(frozen=True, slots=True)
class StepValues:
    """Monte Carlo values of a solution: `values[i]` in [0, 1] after step i, from `rollouts[i]` rollouts."""

    solution_id: str
    question_id: str
    values: tuple[float, ...]
    rollouts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SampleScores:
    """PRM scores in [0, 1] of the samples of one question, in their order."""

    question_id: str
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A training example of the reviser: incorrect attempts, then a correct one (Snell et al., 6.1)."""

    question_id: str
    attempts: tuple[Solution, ...]  # up to `reviser.context` incorrect ones, then the correct one


@dataclass(frozen=True, slots=True)
class Difficulty:
    """One question's difficulty. Bins count from 1 (easiest) to `calibrate.bins` (hardest)."""

    question_id: str
    pass_at_1: float
    quantile_bin: int
    fixed_bin: int


@dataclass(frozen=True, slots=True)
class Harvested:
    """One verified trace. `votes`: number of independent draws that gave it; `bin`: its question's fixed bin."""

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
    """A finished solution in a search.

    `values`: the PRM step values that aggregation needs, and `score` in [0, 1] their aggregate;
    empty and 0 if it was not scored (no answer, or a majority vote). `cost` and `score_cost`:
    tokens charged to sample and to score this candidate alone; 0 in beam search, where candidates
    share work, and of a tree of DVTS all is the first candidate's. `score_cost` is also 0 if an
    equal solution was scored before.
    """

    solution: Solution
    values: tuple[float, ...] = ()
    score: float = 0.0
    cost: int = 0
    score_cost: int = 0
    cached: int = 0  # tokens of `cost` that the prefix cache served
    score_cached: int = 0  # the same for `score_cost`


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a strategy on one question: all candidates and the selected answer.

    `answer`: None if no candidate had a parsable answer. `tokens`: all tokens charged (prompt + generated + scored,
    nominal). `cut_off`: a token limit ended the search.
    """

    question_id: str
    strategy: str
    candidates: tuple[Candidate, ...]
    answer: str | None
    tokens: int
    cached: int = 0  # tokens of `tokens` that the prefix cache served
    cut_off: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """Whether one method's answer to one question was right, and its cost in tokens."""

    question_id: str
    method: str
    correct: bool
    tokens: int
