"""A noisy solver without a model, for tests: it plays solutions out of a script.

The base directory holds a tokenizer and `scripted.json`:

    {"questions": {"2 + 2": [{"text": "2 + 2 = 4\\nAnswer 4", "weight": 3, "right": true},
                             {"text": "2 + 2 = 5\\nAnswer 5"}]},
     "right": 0.9, "wrong": 0.2, "noise": 0.1, "parameters": 1000, "seconds": 0.0, "dies_after": null}

The key of a question is text that its prompt contains (the longest such key counts). A
prompt that ends in the beginning of a solution is continued as one of the solutions with
that beginning, drawn by weight; any other starts a solution. `score` gives `right` where a
right solution has the beginning that the prompt ends in, else `wrong`, give or take half of
`noise`. `seconds` is slept in every step; after `dies_after` sequences the engine dies.

Every draw is a function of (role, model, prompt, the sequence's own seed) and every value one of (role,
model, prompt), so nothing depends on the order in which coroutines run.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from flywheel.errors import EngineDied, UserError
from flywheel.ledger import Ledger
from flywheel.models.driver import Backend, Output, Scoring, ServedModel
from flywheel.models.engine import Sampling
from flywheel.models.weights import NotAModel, load_tokenizer
from flywheel.recipe import EngineSpec
from flywheel.records import Finish, ModelRef

Line = tuple[tuple[int, ...], float, bool]  # token ids, weight, right


def open_backend(spec: EngineSpec, models: Mapping[str, ModelRef], ledger: Ledger, seed: int, scratch: Path) -> Backend:
    """See `flywheel.models.backend.open_backend`. Adapters are not read; the model's name enters the draws."""
    devices = [ScriptedDevice(ref.base, (str(role), ref.name), spec.max_running) for role, ref in models.items()]
    engines = {
        role: ServedModel(
            role, ref.name, device.parameters, spec.max_model_len, device, ledger, bare=ref.adapter is None, seed=seed
        )
        for device, (role, ref) in zip(devices, models.items())
    }
    return Backend(engines, devices)


class ScriptedDevice:
    """See `flywheel.models.driver.Device`."""

    one_pass = True

    def __init__(self, base: str, identity: tuple[int, str, str], batch: int):
        self._tokenizer = load_tokenizer(base)
        try:
            script = json.loads((Path(base) / "scripted.json").read_text(encoding="utf-8"))
            self._lines: dict[str, list[Line]] = {
                key: [(self._encode(line["text"]), line.get("weight", 1.0), line.get("right", False)) for line in lines]
                for key, lines in script["questions"].items()
            }
        except (OSError, KeyError, ValueError) as error:
            raise NotAModel(f"model.base: {base}: no usable scripted.json: {error!r}") from error
        self.parameters: int = script.get("parameters", 1000)
        self._right, self._wrong, self._noise = (
            script.get("right", 0.9),
            script.get("wrong", 0.2),
            script.get("noise", 0.1),
        )
        self._seconds, self._dies_after = script.get("seconds", 0.0), script.get("dies_after")
        self._identity, self._batch = identity, batch
        self._asked = 0
        self.tokens = 0
        self._waiting: list[tuple[asyncio.Future[Output], Output]] = []

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def submit(self, prompt: Sequence[int], request: Sampling | Scoring, adapter: None) -> asyncio.Future[Output]:
        if self._dies_after is not None and self._asked >= self._dies_after:
            raise EngineDied(f"the script of {self._identity[-1]} says that it dies after {self._dies_after} sequences")
        if isinstance(request, Sampling) and (request.top_k, request.min_p, request.repetition_penalty) != (0, 0, 1):
            raise UserError("sample.top_k, min_p, repetition_penalty: the scripted engine draws whole solutions")
        prompt, kind = tuple(prompt), "sample" if isinstance(request, Sampling) else "score"
        if isinstance(request, Sampling):
            drawn = self._play(prompt, request, self._chance(kind, prompt, request.seed))
        else:
            values = tuple(
                self._judge(part, self._chance(kind, part, 0)) for part in (prompt[:read] for read in request.reads)
            )
            drawn = Output((), Finish.LENGTH, False, 0, values)
        self._asked += 1
        self.tokens += len(drawn.tokens) or len(prompt)
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((future, drawn))
        return future

    def _chance(self, kind: str, prompt: tuple[int, ...], asked: int | None) -> random.Random:
        draw = (*self._identity, kind, prompt, asked)
        return random.Random(int.from_bytes(sha256(repr(draw).encode()).digest()))

    @property
    def sequences(self) -> int:
        return len(self._waiting)

    def step(self) -> bool:
        """Answer a batch, the latest first: no caller may rely on the order."""
        time.sleep(self._seconds)
        for _ in range(min(self._batch, len(self._waiting))):
            future, drawn = self._waiting.pop()
            if not future.done():
                future.set_result(drawn)
        return True

    def close(self) -> None:
        self._waiting = []

    def _known(self, prompt: tuple[int, ...]) -> tuple[int, list[Line]]:
        """How many of the prompt's last tokens begin a solution of its question, and the solutions that begin so."""
        text = " ".join(self._tokenizer.decode(list(prompt)).split())
        keys = [key for key in self._lines if key in text]
        if not keys:
            raise ValueError(f"scripted.json has no question for the prompt {text!r:.200}")
        lines = self._lines[max(keys, key=len)]
        begun = [
            next(k for k in range(min(len(tokens), len(prompt)), -1, -1) if prompt[len(prompt) - k :] == tokens[:k])
            for tokens, _, _ in lines
        ]
        return max(begun), [line for line, k in zip(lines, begun) if k == max(begun)]

    def _play(self, prompt: tuple[int, ...], request: Sampling, chance: random.Random) -> Output:
        begun, lines = self._known(prompt)
        weights = [weight for _, weight, _ in lines]
        solution = (
            lines[weights.index(max(weights))][0] if request.temperature == 0 else chance.choices(lines, weights)[0][0]
        )
        tokens = [*solution[begun:], self._tokenizer.eos_token_id]
        for i, token in enumerate(tokens[: request.max_tokens]):
            last = i == len(tokens) - 1
            if token in request.stop or last or (request.done and request.done(tokens[: i + 1])):
                return Output(tuple(tokens[: i + 1]), Finish.STOP, last)
        return Output(tuple(tokens[: request.max_tokens]), Finish.LENGTH, False)

    def _judge(self, prompt: tuple[int, ...], chance: random.Random) -> float:
        begun, lines = self._known(prompt)
        right = begun > 0 and any(right for _, _, right in lines)
        value = (self._right if right else self._wrong) + self._noise * (chance.random() - 0.5)
        return min(1.0, max(0.0, value))
