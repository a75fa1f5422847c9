"""Progress output of a launch in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


def brief(made: dict[str, Any], verdicts: Mapping[str, int] = {}, most: int = 6) -> str:
    """A manifest in one short text: its tokens, the verdicts on the solutions that the stage graded, and its first
    `most` scalar figures, or its record counts if it has none.
    """
    plain = {
        k: v
        for k, v in made["figures"].items()
        if isinstance(v, (int, float, str)) and (k == "why" or len(str(v)) < 60)
    }
    parts = [
        f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in (plain or made["counts"]).items()
    ]
    first = [f"{made['tokens']:,} tokens"] if made["tokens"] else []
    if verdicts:
        first.append(f"{sum(verdicts.values())} graded: " + " ".join(f"{n} {v}" for v, n in sorted(verdicts.items())))
    return ", ".join([*first, *parts[:most]])


class Progress:
    """A progress bar in a terminal; otherwise a line every EVERY seconds.

    If the figures hold `tokens`, a count so far, the line has their rate since the last line too.
    """

    EVERY = 25.0  # a stage's process reports every few seconds, so no silence is longer than 30

    def __init__(self, title: str):
        self.title, self.bar, self.last, self.tokens = title, None, time.monotonic(), 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, done: int, total: int, figures: dict[str, float]) -> None:
        now = time.monotonic()
        notes = {key: f"{value:,}" if key == "tokens" else f"{value:.4g}" for key, value in figures.items()}
        if (tokens := figures.get("tokens", 0)) and now > self.last:
            notes["tokens/s"] = f"{(tokens - self.tokens) / (now - self.last):.0f}"
        if sys.stderr.isatty():
            self.bar = self.bar if self.bar is not None else tqdm(desc=self.title, leave=False, total=total)
            self.bar.n, self.bar.total = done, total
            self.bar.set_postfix(notes)
        elif now - self.last >= self.EVERY:
            print(f"{self.title}  {done}/{total}  {' '.join(f'{k} {v}' for k, v in notes.items())}", flush=True)
        if now - self.last >= self.EVERY:
            self.last, self.tokens = now, tokens
