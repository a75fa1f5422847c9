"""Count all tokens charged, by role, stage and purpose.

FLOPs of a token are 2N with N parameters, and 4 times the attention's width for every token that it attends to
(Kaplan et al. 2020; Snell et al., section 7, leave attention out). Training costs as much again for the gradients of
the activations, and 2 a token for every trained parameter: 6N if all are, about 4N with LoRA. Counts are nominal: a
token that the prefix cache served is counted under `prompt` and also under `cached`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields


@dataclass(slots=True)
class Spent:
    """Token counts and FLOPs of one (role, stage, purpose)."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    scored: int = 0
    trained: int = 0
    flops: float = 0.0

    @property
    def tokens(self) -> int:
        """Nominal tokens processed: prompt + generated + scored + trained."""
        return self.prompt + self.generated + self.scored + self.trained

    def add(self, other: Spent) -> None:
        for item in fields(other):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


def pairs(start: int, end: int) -> int:
    """The (query, key) pairs of causal attention for the tokens `start` to `end` - 1 of a sequence."""
    return (end * (end + 1) - start * (start + 1)) // 2


_METERS: ContextVar[tuple[Spent, ...]] = ContextVar("meters", default=())


@contextmanager
def metered() -> Iterator[Spent]:
    """Sum the inference charges, to any ledger, of the coroutine in this block and of the tasks that it starts.

    This measures one question's cost among hundreds of concurrent ones. Blocks can be nested.
    """
    spent = Spent()
    token = _METERS.set((*_METERS.get(), spent))
    try:
        yield spent
    finally:
        _METERS.reset(token)


_PART: ContextVar[tuple[Ledger, Ledger] | None] = ContextVar("part", default=None)


class Ledger:
    """The tokens that one stage in one round spent, by role and purpose; `rows()` is stored on disk.

    verdicts: counts of those on the solutions that were graded.
    """

    def __init__(self, stage: str, round: int):
        self.stage, self.round = stage, round
        self._spent: dict[tuple[str, str], Spent] = {}
        self.verdicts: Counter[str] = Counter()
        self.so_far = 0  # tokens generated or judged, of unfinished sequences too: a sign of life, no charge

    @contextmanager
    def charged_to(self, part: Ledger) -> Iterator[None]:
        """Inside, the coroutine and the tasks that it starts charge `part` where they would charge this ledger."""
        token = _PART.set((self, part))
        try:
            yield
        finally:
            _PART.reset(token)

    @property
    def current(self) -> Ledger:
        """The ledger that is charged here: this one, or a part of it (`charged_to`)."""
        whole, part = _PART.get() or (self, self)
        return part if whole is self else self

    def _at(self, role: str, purpose: str) -> Spent:
        return self._spent.setdefault((str(role), purpose), Spent())

    def charge(
        self,
        role: str,
        purpose: str,
        *,
        parameters: int,
        prompt: int = 0,
        cached: int = 0,
        generated: int = 0,
        scored: int = 0,
        attention: int = 0,
        attended: int = 0,
    ) -> None:
        """Charge inference. `cached` of the prompt or scored tokens cost no FLOPs. Raises ValueError for bad counts.

        attention: the width of the model's attention, heads x head dimension over all layers. attended: see `pairs`.
        """
        if min(prompt, cached, generated, scored) < 0 or cached > prompt + scored:
            raise ValueError(
                f"ledger: impossible charge for {role}/{purpose}: {prompt=} {cached=} {generated=} {scored=}"
            )
        computed = prompt + generated + scored - cached
        flops = 2.0 * parameters * computed + 4.0 * attention * attended
        spent = Spent(prompt=prompt, cached=cached, generated=generated, scored=scored, flops=flops)
        for account in (self.current._at(role, purpose), *_METERS.get()):
            account.add(spent)

    def train(
        self,
        role: str,
        purpose: str,
        *,
        parameters: int,
        trained: int,
        tokens: int,
        attention: int = 0,
        attended: int = 0,
    ) -> None:
        """Charge `tokens` processed in training, over all epochs. trained: those of the `parameters` that learn."""
        flops = (4.0 * parameters + 2.0 * trained) * tokens + 12.0 * attention * attended
        self._at(role, purpose).add(Spent(trained=tokens, flops=flops))

    def tokens(self) -> int:
        return sum(spent.tokens for spent in self._spent.values())

    def rows(self) -> list[dict]:
        return [
            {"stage": self.stage, "round": self.round, "role": role, "purpose": purpose, **asdict(spent)}
            for (role, purpose), spent in sorted(self._spent.items())
        ]

    def take(self) -> list[dict]:
        """Return the rows so far and reset the ledger to zero."""
        rows, self._spent = self.rows(), {}
        return rows


def total(rows: Iterable[dict], *by: str) -> Iterator[tuple[tuple[str, ...], Spent]]:
    """Sum ledger rows grouped by some of `round`, `stage`, `role`, `purpose`; yields (key, sum) sorted by key."""
    sums: dict[tuple[str, ...], Spent] = {}
    names = [item.name for item in fields(Spent)]
    for row in rows:
        key = tuple(str(row[name]) for name in by)
        sums.setdefault(key, Spent()).add(Spent(**{name: row[name] for name in names}))
    yield from sorted(sums.items())
