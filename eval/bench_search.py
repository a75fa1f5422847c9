"""Does beam search keep the engine as full as best-of-N does?

    python -m eval.bench_search RUN [--round 1] [--n 16] [--questions 500]

The policy and PRM that search in that round of a finished run, on its training questions (no
test question is touched): best-of-N weighted, then a beam of N and width 4, the same questions,
one after the other in one process, each all at once. Prints JSON, for each:

- processed tokens (prefilled + decoded + scored, without what the prefix cache served) a second, and where the
  seconds go;
- by model, the mean number of sequences that wait for the device at a step, which runs at most `engine.max_running`;
- the prefix cache's hit rate, and the bound that its block size allows: whole blocks of a prompt that some
  earlier sequence has filled.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.cli import answer
from flywheel.ledger import total
from flywheel.recipe import load
from flywheel.records import Beam, BestOfN, Role, Split, Strategy
from flywheel.runs.run import Context, Stage
from flywheel.search.run import search
from flywheel.stages.kit import ids, kit, search_tools, searchers


@dataclass
class Watch:
    """What passes through one device."""

    block: int
    steps: int = 0
    held: int = 0
    seconds: float = 0.0
    prompt: int = 0
    reachable: int = 0  # tokens in whole blocks that an earlier sequence has filled
    full: set[tuple[int, ...]] = field(default_factory=set)

    def put_on(self, device) -> None:
        submit, step = device.submit, device.step

        def watched_submit(prompt, request, adapter):
            future = submit(prompt, request, adapter)
            ends = range(self.block, len(prompt), self.block)  # the last token is always computed
            known = [end for end in ends if tuple(prompt[:end]) in self.full]
            self.prompt += len(prompt)
            self.reachable += max(known, default=0)
            future.add_done_callback(lambda done: done.cancelled() or self.fill([*prompt, *done.result().tokens]))
            return future

        def watched_step():
            self.steps += 1
            self.held += len(device._waiting)
            begun = time.perf_counter()
            step()
            self.seconds += time.perf_counter() - begun

        device.submit, device.step = watched_submit, watched_step

    def fill(self, tokens: list[int]) -> None:
        self.full.update(tuple(tokens[:end]) for end in range(self.block, len(tokens), self.block))


def measure(run: Path, round: int, n: int, questions: int) -> dict:
    reads = ("train_prm", "choose_reviser", "gate@-1?", "distill@-1?")
    stage = Stage("bench_search", (), reads, items=lambda ctx: [], work=lambda *_: iter(()))
    ctx = Context(load(run / "recipe.yaml"), run, round, stage)
    asked, out = ids(ctx, Split.TRAIN)[:questions], {"run": run.name, "round": round, "questions": 0, "n": n}
    out["questions"] = len(asked)
    models = {role: ref for role, ref in searchers(ctx).items() if role != Role.REVISER}
    with kit(ctx, models, Split.TRAIN) as open_kit:
        from flywheel.models.vllm import current_platform
        from flywheel.models.vllm_cpu import BLOCK_SIZE

        tools = search_tools(open_kit, reviser=False)
        for strategy in (BestOfN(n), Beam(n, min(4, n))):
            block = BLOCK_SIZE if current_platform.is_cpu() else 16
            out[type(strategy).__name__] = one(ctx, open_kit, tools, asked, strategy, block)
    out["beam_over_best_of_n"] = (
        out["Beam"]["processed_tokens_per_second"] / out["BestOfN"]["processed_tokens_per_second"]
    )
    return out


def one(ctx: Context, open_kit, tools, asked: Sequence[str], strategy: Strategy, block: int) -> dict:
    devices = {
        id(device): device for device in (open_kit.engine(role).device for role in (Role.POLICY, Role.PRM))
    }  # one on a GPU
    watches = {}
    for key, device in devices.items():
        for name in ("submit", "step"):
            device.__dict__.pop(name, None)  # the last strategy's watch
        watches[key] = Watch(block)
        watches[key].put_on(device)
    ctx.ledger.take()
    begun = time.perf_counter()
    for _ in open_kit.each(asked, lambda q: search(strategy, open_kit.problems[q].question, tools, tag="bench")):
        pass
    seconds = time.perf_counter() - begun
    spent = dict(total(ctx.ledger.rows(), "role"))
    by_device = {}
    for key, watch in watches.items():
        roles = [role for role in (Role.POLICY, Role.PRM) if id(open_kit.engine(role).device) == key]
        mine = [spent[(str(role),)] for role in roles if (str(role),) in spent]
        by_device[" and ".join(roles)] = {
            "seconds": watch.seconds,
            "processed_tokens": sum(s.tokens - s.cached for s in mine),
            "steps": watch.steps,
            "mean_waiting": watch.held / watch.steps,
            "hit_rate": sum(s.cached for s in mine) / watch.prompt,
            "hit_rate_bound": watch.reachable / watch.prompt,
        }
    processed = sum(s.tokens - s.cached for s in spent.values())
    return {
        "seconds": seconds,
        "processed_tokens": processed,
        "processed_tokens_per_second": processed / seconds,
        "outside_the_devices": seconds - sum(w.seconds for w in watches.values()),
        **by_device,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.bench_search", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--questions", type=int, default=500)
    args = parser.parse_args(argv)
    return answer(lambda: measure(args.run, args.round, args.n, args.questions))


if __name__ == "__main__":
    sys.exit(main())
