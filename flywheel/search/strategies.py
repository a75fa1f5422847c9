"""The list of strategies, and how a recipe's names and options become strategies."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator
from typing import Annotated, get_args, get_type_hints

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


def named(text: str) -> Strategy:
    """The strategy that a person names as `greedy` or `KIND:N[:OPTION...]`, N the generations.

    An option is `key=value`, or a word that is a value of one key only: `best_of_n:16:majority`, `beam:16:width=4`,
    `adaptive:16:reviser:sure=0.9`. Raises UserError.
    """
    name, *rest = text.split(":")
    if name not in KINDS:
        raise UserError(f"strategy {text!r}: unknown{_nearest(name, KINDS)}; known: {', '.join(KINDS)}")
    count, *options = ["1", *rest] if name == "greedy" else rest or [""]
    if not (count.isdecimal() and len(count) <= 6 and int(count)):
        raise UserError(f"strategy {text!r}: a number of generations below a million is wanted, as in {name}:16")
    values = get_type_hints(KINDS[name].at, include_extras=True).items()
    words = {word: key for key, hint in values for word in get_args(hint) if isinstance(word, str)}
    given: dict[str, int | float | str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            if key not in words:
                raise UserError(f"strategy {text!r}: no key of {name} is known by {key}; write KEY={key}")
            key, value = words[key], key
        if key in StrategySpec.model_fields:
            raise UserError(f"strategy {text!r}: {key} is no option of {name}")
        given[key] = int(value) if value.isdecimal() else _number(value)
    found = _at(StrategySpec(kind=name, **given), int(count), f"strategy {text!r}")
    if isinstance(found, Unfit):
        raise UserError(f"strategy {text!r}: {found.args[0]} does not fit {count} generations: {found.args[1]}")
    return found


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""
