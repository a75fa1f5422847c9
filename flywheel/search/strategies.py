"""The list of strategies, and how a recipe's names and options become strategies."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import ConfigDict, PlainSerializer, PlainValidator, ValidationError, validate_call

from flywheel.errors import UserError
from flywheel.recipe import CalibrateSpec, StrategySpec
from flywheel.search.adaptive import Adaptive
from flywheel.search.beam import Beam
from flywheel.search.best_of_n import BestOfN
from flywheel.search.dvts import Dvts
from flywheel.search.greedy import Greedy
from flywheel.search.particle import Particle
from flywheel.search.revise import Revise
from flywheel.search.strategy import Strategy, Unfit

STRATEGIES: tuple[type[Strategy], ...] = (
    Greedy,
    BestOfN,
    Beam,
    Dvts,
    Particle,
    Revise,
    Adaptive,
)  # add a new strategy here
KINDS = {strategy.kind: strategy for strategy in STRATEGIES}


def from_dict(data: dict) -> Strategy:
    """The inverse of `Strategy.to_dict`. Raises KeyError for an unknown kind and TypeError for unknown fields."""
    return KINDS[data["kind"]](**{name: value for name, value in data.items() if name != "kind"})


# for fields of records; stored with the kind, since the fields of one strategy may be a part of another's
AnyStrategy = Annotated[
    Strategy,
    PlainValidator(lambda value: value if isinstance(value, Strategy) else from_dict(value)),
    PlainSerializer(lambda strategy: strategy.to_dict()),
]


def strategies(spec: CalibrateSpec) -> list[tuple[int, Strategy]]:
    """Every distinct (budget, strategy) that a recipe asks for, in ascending order of budget.

    A budget counts generated final answers, as in the paper. Strategies that cannot spend a budget are skipped
    (`left_out` lists them). Raises UserError for an unknown kind or option.
    """
    return list(dict.fromkeys((budget, s) for budget, s in _asked(spec) if isinstance(s, Strategy)))


def left_out(spec: CalibrateSpec) -> list[str]:
    """One line for each (budget, strategy) of the recipe that `strategies` skips, with the reason."""
    unfit = [(budget, why.args) for budget, why in _asked(spec) if isinstance(why, Unfit)]
    return [f"{what} left out at budget {budget}: {why}" for budget, (what, why) in unfit]


def _asked(spec: CalibrateSpec) -> Iterator[tuple[int, Strategy | Unfit]]:
    for budget in sorted(set(spec.budgets)):
        for place, asked in enumerate(spec.strategies):
            if budget <= (asked.max_budget or budget):
                yield budget, _at(asked, budget, f"calibrate.strategies.{place}")


def _at(spec: StrategySpec, budget: int, where: str) -> Strategy | Unfit:
    if (kind := KINDS.get(spec.kind)) is None:
        raise UserError(
            f"{where}.kind: unknown strategy {spec.kind!r}{_nearest(spec.kind, KINDS)}; known: {', '.join(KINDS)}"
        )
    known = [name for name in inspect.signature(kind.at).parameters if name != "budget"]
    for name in spec.options:
        if name not in known:
            raise UserError(
                f"{where}.{name}: unknown key of {spec.kind}{_nearest(name, known)}; known: {', '.join(known)}"
            )
    try:
        return validate_call(kind.at, config=ConfigDict(strict=True))(budget, **spec.options)
    except Unfit as unfit:
        return unfit
    except ValidationError as error:
        fault = error.errors()[0]
        option = fault["loc"][0]
        raise UserError(f"{where}.{option}: {fault['msg']} (got {spec.options[option]!r})") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""
