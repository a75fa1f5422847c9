"""Does beam search keep the engine as full as best-of-N does? python -m eval.bench.search RUN [--n 16]

The policy and PRM that search in that round of a finished run, on its training questions (no test question is
touched): best-of-N weighted, then a beam of N and width 4, the same questions, one after the other in one process,
each all at once. Prints JSON, for each:

- processed tokens (prefilled + decoded + scored, without what the prefix cache served) a second, and where the
  seconds go;
- by model, the mean number of sequences that wait for the device at a step, which runs at most `engine.max_running`;
- the prefix cache's hit rate, and the bound that its block size allows: whole blocks of a prompt that some earlier
  sequence has filled.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field

from flywheel.ledger import Ledger, total
from flywheel.records import Role, Split
from flywheel.runs.run import Run
from flywheel.search.beam import Beam
from flywheel.search.best_of_n import BestOfN
from flywheel.search.run import search
from flywheel.search.strategy import Strategy
from flywheel.stages.kit import Kit, open_kit
from flywheel.stages.shared import ids

GPU_BLOCK = 16  # tokens per KV block, vLLM's default on a GPU


@dataclass
class Watch:
    """Counts the requests and steps of one device."""

    block: int
    steps: int = 0
    waiting: int = 0
    seconds: float = 0.0
    prompt: int = 0
    reachable: int = 0  # prompt tokens in whole blocks that an earlier sequence filled
    full: set[tuple[int, ...]] = field(default_factory=set)

    def put_on(self, device) -> None:
        submit, step = device.submit, device.step

        def watched_submit(prompt, request, adapter):
            future = submit(prompt, request, adapter)
            ends = range(self.block, len(prompt), self.block)  # the last token is always computed
            self.prompt += len(prompt)
            self.reachable += max((end for end in ends if tuple(prompt[:end]) in self.full), default=0)
            future.add_done_callback(lambda done: done.cancelled() or self.fill([*prompt, *done.result().tokens]))
            return future

        def watched_step():
            self.steps += 1
            self.waiting += len(device._waiting)
            begun = time.perf_counter()
            step()
            self.seconds += time.perf_counter() - begun

        device.submit, device.step = watched_submit, watched_step

    def fill(self, tokens: list[int]) -> None:
        self.full.update(tuple(tokens[:end]) for end in range(self.block, len(tokens), self.block))


def one(kit: Kit, ledger: Ledger, asked: Sequence[str], strategy: Strategy, block: int) -> dict:
    """The figures of one strategy on all questions."""
    devices: dict[int, tuple[object, list[Role]]] = {}  # on a GPU both roles share one
    for role in (Role.POLICY, Role.PRM):
        device = kit.engine(role).device
        devices.setdefault(id(device), (device, []))[1].append(role)
    watches = {}
    for key, (device, _) in devices.items():
        for name in ("submit", "step"):
            device.__dict__.pop(name, None)  # remove the previous strategy's Watch
        watches[key] = Watch(block)
        watches[key].put_on(device)
    ledger.take()
    searcher, begun = kit.searcher(reviser=False), time.perf_counter()
    kit.backend.run(asked, lambda q: search(strategy, kit.problems[q].question, searcher, tag="bench"))
    seconds = time.perf_counter() - begun
    spent = {role: s for (role,), s in total(ledger.rows(), "role")}
    processed = sum(s.tokens - s.cached for s in spent.values())
    out: dict = {
        "seconds": seconds,
        "processed_tokens": processed,
        "processed_tokens_per_second": processed / seconds,
        "outside_the_devices": seconds - sum(w.seconds for w in watches.values()),
    }
    for key, (_, roles) in devices.items():
        watch, mine = watches[key], [spent[role] for role in roles if role in spent]
        out[" and ".join(roles)] = {
            "seconds": watch.seconds,
            "processed_tokens": sum(s.tokens - s.cached for s in mine),
            "steps": watch.steps,
            "mean_waiting": watch.waiting / watch.steps,
            "hit_rate": sum(s.cached for s in mine) / watch.prompt,
            "hit_rate_bound": watch.reachable / watch.prompt,
        }
    return out


def measure(run: Run, round: int, n: int, questions: int) -> dict:
    asked, ledger = ids(run, Split.TRAIN)[:questions], Ledger("bench", round)
    models = {Role.POLICY: run.model(Role.POLICY, round - 1), Role.PRM: run.model(Role.PRM, round)}
    out: dict = {"run": run.root.name, "round": round, "questions": len(asked), "n": n}
    with open_kit(run, models, Split.TRAIN, ledger=ledger, seed=run.recipe.seed) as kit:
        from flywheel.models.vllm import current_platform
        from flywheel.models.vllm_cpu import BLOCK_SIZE

        block = BLOCK_SIZE if current_platform.is_cpu() else GPU_BLOCK
        for strategy in (BestOfN(n), Beam(n, min(4, n))):
            out[type(strategy).__name__] = one(kit, ledger, asked, strategy, block)
    rates = [out[name]["processed_tokens_per_second"] for name in ("Beam", "BestOfN")]
    return {**out, "beam_over_best_of_n": rates[0] / rates[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Run, metavar="RUN")
    parser.add_argument("--round", type=int, default=1, metavar="R")
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--questions", type=int, default=500)
    args = parser.parse_args()
    with redirect_stdout(sys.stderr):
        found = measure(args.run, args.round, args.n, args.questions)
    print(json.dumps({"command": " ".join(["python -m eval.bench.search", *sys.argv[1:]]), **found}, indent=1))


if __name__ == "__main__":
    main()
