"""Count all tokens charged, by role, stage and purpose.

FLOPs are 2N per token for inference and 6N per token for training with N parameters
(Kaplan et al. 2020, as used in Snell et al., section 7). Counts are nominal: a token
that the prefix cache served is counted under `prompt` and also under `cached`.
"""

from __future__ import annotations

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


class Ledger:
    """The tokens that one stage in one round spent, by role and purpose; `rows()` is stored on disk."""

    def __init__(self, stage: str, round: int):
        self.stage, self.round = stage, round
        self._spent: dict[tuple[str, str], Spent] = {}
        self.so_far = 0  # tokens generated or judged, of unfinished sequences too: a sign of life, no charge

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
    ) -> None:
        """Charge inference. `cached` of the prompt or scored tokens cost no FLOPs. Raises ValueError for bad counts."""
        if min(prompt, cached, generated, scored) < 0 or cached > prompt + scored:
            raise ValueError(
                f"ledger: impossible charge for {role}/{purpose}: {prompt=} {cached=} {generated=} {scored=}"
            )
        computed = prompt + generated + scored - cached
        spent = Spent(
            prompt=prompt, cached=cached, generated=generated, scored=scored, flops=2.0 * parameters * computed
        )
        for account in (self._at(role, purpose), *_METERS.get()):
            account.add(spent)

    def train(self, role: str, purpose: str, *, parameters: int, tokens: int) -> None:
        """Charge `tokens` processed in training, over all epochs."""
        self._at(role, purpose).add(Spent(trained=tokens, flops=6.0 * parameters * tokens))

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
