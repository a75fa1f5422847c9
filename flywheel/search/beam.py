"""Beam and lookahead search against the PRM (Snell et al., 5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flywheel.models.engine import Completion
from flywheel.models.prm import aggregate, together
from flywheel.records import Beam, Candidate, Finish, Question, Step
from flywheel.search.tools import Found, Tools

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prefix:
    """Steps so far, as tokens, with the PRM's value after each."""

    tokens: Tokens = ()
    values: tuple[float, ...] = ()


async def beam(strategy: Beam, question: Question, tools: Tools, *, tag: str) -> Found:
    """Sample N first steps; then, step by step, keep the best N/width prefixes and continue each `width` times.

    A finished solution leaves the beam with its place: the places still open, N less the
    finished ones, are what the kept prefixes share, so that the search concludes with
    exactly N candidates, as the paper's does. It ends when all have finished, or after
    `max_rounds` steps (`sample.max_steps`, if fewer); what is open then is cut off, and so
    is a step that meets `sample.max_tokens`, counted over the whole solution.

    Identical prefixes are judged once and compete as one, or the beam would fill with
    copies of a likely step; the copies drawn are counted (`duplicates`).

    With `lookahead` k the value of an open prefix is read after up to k more steps at
    temperature 0; finished solutions are judged as they stand.
    """
    if not 1 <= strategy.width <= strategy.n:
        raise ValueError(f"beam: a width of 1 to {strategy.n} wanted, got {strategy.width}")
    reader, how = tools.reader, tools.prm.aggregate
    head = tools.prompts.solve(question)
    values: dict[Tokens, float] = {}  # of a prefix, without the blank that closes it
    candidates: list[Candidate] = []
    duplicates = rounds = 0

    async def grow(prefix: Prefix, count: int) -> list[tuple[Prefix, Completion]]:
        room = tools.sample.max_tokens - len(prefix.tokens)
        sampling = replace(tools.sampling(), max_tokens=room, stop=reader.ends | reader.stop)
        return [
            (prefix, step)
            for step in await tools.policy.generate([*head, *prefix.tokens], sampling, purpose="beam", n=count)
        ]

    async def ahead(tokens: Tokens) -> Tokens:
        for _ in range(strategy.lookahead):
            room = tools.sample.max_tokens - len(tokens)
            greedy = replace(tools.sampling(), temperature=0.0, max_tokens=room, stop=reader.ends | reader.stop)
            [step] = await tools.policy.generate([*head, *tokens], greedy, purpose="lookahead")
            tokens += step.tokens
            if step.finish is Finish.LENGTH or reader.ended(step) or len(tokens) >= tools.sample.max_tokens:
                break
        return tokens

    async def value(steps: tuple[Step, ...], open: Tokens | None) -> float:
        if open is not None and strategy.lookahead:
            steps = reader.steps(reader.trim(await ahead(open)))
        return await tools.prm.value(question, steps)

    async def judge(wanted: Mapping[Tokens, tuple[tuple[Step, ...], Tokens | None]]) -> None:
        new = [key for key in wanted if key not in values]
        found = await together(value(*wanted[key]) for key in new)
        values.update(zip(new, found))

    kept = [(Prefix(), strategy.n)]  # a prefix, and how many continuations it gets
    while kept:
        rounds += 1
        final = rounds >= min(strategy.max_rounds, tools.sample.max_steps)
        grown = [item for group in await together(grow(*item) for item in kept) for item in group]
        ended, going, wanted = [], {}, {}
        for prefix, step in grown:
            tokens = prefix.tokens + step.tokens
            full = final or step.finish is Finish.LENGTH or len(tokens) >= tools.sample.max_tokens
            if full or reader.ended(step):
                solution = reader.solution(
                    tokens,
                    Finish.STOP if reader.ended(step) else Finish.LENGTH,
                    id=f"{question.id}/{tag}/{len(candidates) + len(ended)}",
                    question_id=question.id,
                    origin=f"beam:{strategy.n}:{strategy.width}:{tools.policy.name}",
                )
                ended.append((prefix, solution))
                if solution.answer is not None:
                    wanted[solution.tokens] = (solution.steps, None)
            else:
                going[tokens] = prefix
                wanted[reader.trim(tokens)] = (reader.steps(tokens), tokens)
        duplicates += len(grown) - len({prefix.tokens + step.tokens for prefix, step in grown})
        await judge(wanted)

        before = len(candidates)
        for prefix, solution in ended:
            if solution.answer is None:
                candidates.append(Candidate(solution))
                continue
            # a closing stop token or blank adds no step: the last value then stands for the step before
            seen = (*prefix.values[: len(solution.steps) - 1], values[solution.tokens])
            candidates.append(Candidate(solution, seen, aggregate(seen, how)))
        if tools.kept:
            tools.kept.candidates.update((c.solution.id, c) for c in candidates[before:])
        alive = [Prefix(tokens, (*prefix.values, values[reader.trim(tokens)])) for tokens, prefix in going.items()]
        alive.sort(key=lambda p: -aggregate(p.values, how))
        open_places = strategy.n - len(candidates)
        best = alive[: -(-open_places // strategy.width)]
        kept = [(prefix, open_places // len(best) + (i < open_places % len(best))) for i, prefix in enumerate(best)]
    return Found(tuple(candidates), {"duplicates": duplicates, "rounds": rounds})
