"""The seed corpus: what an imperfect author and a somewhat better grader wrote.

Documents are lists of words (see tokenizer.py), in three kinds:

- solution: ``Q 5 +3 ? \\n Try 5 +3 =8 \\n Answer 8 <eos>``;
- graded work: ``Check`` in place of ``Try``, and ``ok``/``no`` right after some results.  A mark says
  that everything since the previous mark (or the start) is right.  In some documents every line is
  marked, in some a random part of the lines, in some only the last line of an unmarked beginning;
- thread: ``Try ... Answer 8 \\n Again 5 +3 ...``, several attempts of one author at one question.

Nothing depends on gold: no attempt knows whether an earlier one was right.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from .domain import FACTS, MAX_K, MISCONCEPTION_SHARE, OPS, Fact, make_question, other, parse_question
from .tokenizer import EOS

SHARES = {"solution": 0.30, "graded": 0.50, "thread": 0.20}
EARLY_SHARES = {"solution": 0.15, "graded": 0.75, "thread": 0.10}  # while every line is marked
GRADED_SHARES = {"every line": 0.40, "some lines": 0.30, "one mark": 0.30}
SKIP, MISREAD, SLIP = 0.010, 0.005, 0.05
MAX_ATTEMPTS = 5


@dataclass(frozen=True)
class Line:
    """A written step: (value, op) -> result, and whether op is the question's operation at this place."""

    value: int
    op: str
    result: int
    in_place: bool

    def words(self) -> list[str]:
        return [str(self.value), self.op, f"={self.result}"]


class Author:
    """Writes attempts.  `repeats`: the probability of repeating an earlier result for the same fact."""

    def __init__(self, rng: random.Random, repeats: float = 0.0):
        self.rng, self.repeats, self.said = rng, repeats, {}

    def result(self, fact: Fact) -> int:
        rng, key = self.rng, (fact.value, fact.op)
        if not (key in self.said and rng.random() < self.repeats):
            if rng.random() < fact.class_.author:
                self.said[key] = fact.right
            elif rng.random() < MISCONCEPTION_SHARE:
                self.said[key] = fact.misconception
            else:
                self.said[key] = other(rng, fact.right)
        return self.said[key]

    def attempt(self, question: str) -> tuple[list[Line], bool]:
        """(lines, whether the last operations of the question were skipped)."""
        rng = self.rng
        value, ops = parse_question(question)
        lines, skipped = [], False
        for i, op in enumerate(ops):
            last_hope = i == len(ops) - 1 and not lines
            if rng.random() < SKIP and not last_hope:
                skipped = True
                continue
            written = rng.choice(OPS) if rng.random() < MISREAD else op
            result = self.result(FACTS[value, written])
            lines.append(Line(value, written, result, written == op and not skipped))
            value, skipped = result, False
        return lines, skipped


class Grader:
    """Marks lines.  For each fact he knows the right result or believes the misconception.

    `doubt` scales his error rate: 1 as declared, 0 never wrong.
    """

    def __init__(self, rng: random.Random, doubt: float = 1.0):
        self.rng, self.doubt, self.believed = rng, doubt, {}

    def approves(self, line: Line) -> bool:
        fact = FACTS[line.value, line.op]
        key = fact.value, fact.op
        if key not in self.believed:
            knows = self.rng.random() >= self.doubt * (1 - fact.class_.grader)
            self.believed[key] = fact.right if knows else fact.misconception
        return line.in_place and line.result == self.believed[key]

    def mark(self, approved: bool) -> str:
        return "ok" if approved != (self.rng.random() < self.doubt * SLIP) else "no"


def attempt_words(lines: list[Line]) -> list[str]:
    words = []
    for line in lines:
        words += [*line.words(), "\n"]
    return [*words, "Answer", str(lines[-1].result)]


def marked_lines(rng: random.Random, n: int, sparse: float) -> tuple[set[int], int]:
    """Which of n lines carry a mark, and after how many lines the document ends."""
    kind = rng.choices(list(GRADED_SHARES), list(GRADED_SHARES.values()))[0]
    match kind if rng.random() < sparse else "every line":
        case "every line":
            return set(range(n)), n
        case "some lines":
            rate = rng.random()
            return {i for i in range(n) if rng.random() < rate} | {n - 1}, n
        case _:
            end = rng.randint(1, n)
            return {end - 1}, end


def graded_words(rng: random.Random, question: str, sparse: float = 1.0) -> list[str]:
    """The graded attempt; the answer is its last line, wrong if operations before it were skipped.

    `sparse` is the share of documents that follow GRADED_SHARES; the others have every line marked.
    """
    lines, skipped = Author(rng).attempt(question)
    grader = Grader(rng, doubt=sparse)
    marked, end = marked_lines(rng, len(lines) + 1, sparse)
    words, good = [], True
    for i in range(end):
        if i < len(lines):
            good = grader.approves(lines[i]) and good
            words += lines[i].words()
        else:
            good = good and not skipped
            words += ["Answer", str(lines[-1].result)]
        if i in marked:
            words.append(grader.mark(good))
            good = True
        words.append("\n")
    return words[:-1]


def document(rng: random.Random, max_k: int = MAX_K, sparse: float = 1.0) -> tuple[list[str], int]:
    """(a document's words, index of the first word that gets loss, which is the one after the question)."""
    question = make_question(rng, rng.randint(1, max_k))
    head = ["Q", *question.split(), "?", "\n"]
    shares = {kind: sparse * share + (1 - sparse) * EARLY_SHARES[kind] for kind, share in SHARES.items()}
    match rng.choices(list(shares), list(shares.values()))[0]:
        case "solution":
            body = ["Try", *attempt_words(Author(rng).attempt(question)[0])]
        case "graded":
            body = ["Check", *graded_words(rng, question, sparse)]
        case _:
            author = Author(rng, repeats=rng.random())
            body = ["Try", *attempt_words(author.attempt(question)[0])]
            for _ in range(rng.randint(1, MAX_ATTEMPTS - 1)):
                body += ["\n", "Again", *attempt_words(author.attempt(question)[0])]
    return [*head, *body, EOS], len(head)


def batches(
    rng: random.Random, max_k: int, sparse: float, tokens: int, pool: int = 32
) -> Iterator[list[tuple[list[str], int]]]:
    """A pool of batches in random order; a batch has about `tokens` tokens in documents of similar length."""
    documents, size = [], 0
    while size < tokens * pool:
        documents.append(document(rng, max_k, sparse))
        size += len(documents[-1][0])
    documents.sort(key=lambda d: (len(d[0]), rng.random()))
    made, batch = [], []
    for doc in documents:
        if batch and (len(batch) + 1) * len(doc[0]) > tokens * 1.15:
            made.append(batch)
            batch = []
        batch.append(doc)
    made.append(batch)
    rng.shuffle(made)
    yield from made
