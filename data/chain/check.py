"""Measure what the laboratory promises: ``python -m data.chain.check [--model DIR] [--json]``.

Straight off the model, with transformers alone (no flywheel): graded difficulty (1), reachable and not
by chance (2), knows more when checking (3), small (8); and, as a first look at (4), the answers that
majority and the model's own marks select.  Intervals are 95% percentile bootstraps over questions.
With ``--run RUN [RUN ...]`` (finished runs, seeds of one recipe) it prints properties 4 to 7 instead:
the verifiers (`python -m eval verifiers`), beam against best-of-n by bin, revision by attempt, and the loop
(`python -m eval seeds`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from . import problems
from .domain import CLASSES, FACTS, MAX_K, P, parse_solution, parse_step, right_so_far, step_is_right
from .tokenizer import EOS, ID, PAD, WORDS, to_text

SEED_MODEL = Path(__file__).parent / "seed_model"
FIXED_EDGES = (0.2, 0.4, 0.6, 0.8)


def load(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def encode(text: str) -> list[int]:
    return [ID[word] for word in text.replace("\n", " \n ").split(" ") if word]


def sample(
    model,
    questions: list[str],
    n: int,
    seed: int = 0,
    batch: int = 384,
    prefix: str = "Try",
    max_lines: int = MAX_K + 2,
) -> tuple[list[list[str]], int]:
    """(n solutions per question at temperature 1, as text; the number of generated tokens)."""
    import torch

    torch.manual_seed(seed)
    solutions: list[list[str]] = [[] for _ in questions]
    waiting = defaultdict(list)  # prompt length -> (question index, prompt): equal lengths need no padding
    for i, question in enumerate(questions):
        prompt = encode(f"Q {question} ?\n{prefix}")
        waiting[len(prompt)] += [(i, prompt)] * n
    generated = 0
    for rows in waiting.values():
        for at in range(0, len(rows), batch):
            part = rows[at : at + batch]
            ids = torch.tensor([prompt for _, prompt in part])
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=4 * max_lines + 3,
                    eos_token_id=[ID[EOS], ID["Again"]],
                    pad_token_id=ID[PAD],
                )
            for (i, _), row in zip(part, out[:, ids.shape[1] :].tolist()):
                words = [WORDS[token] for token in row if token != ID[PAD]]
                generated += len(words)
                end = words.index("Answer") + 2 if "Answer" in words else len(words)
                solutions[i].append(to_text(words[:end]))
    return solutions, generated


def marks(model, pairs: list[tuple[str, str]], tokens: int = 12_000) -> list[np.ndarray]:
    """The model's value of every line of unmarked work: P(ok) against P(no) right after the line's last token."""
    import torch

    texts = [encode(f"Q {question} ?\nCheck {solution}\n") for question, solution in pairs]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    values: list[np.ndarray] = [np.empty(0)] * len(texts)
    at = 0
    while at < len(order):
        rows = max(1, tokens // len(texts[order[min(len(order) - 1, at + 64)]]))
        part, at = order[at : at + rows], at + rows
        width = len(texts[part[-1]])
        ids = torch.tensor([texts[i] + [ID[PAD]] * (width - len(texts[i])) for i in part])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[..., [ID["no"], ID["ok"]]].softmax(-1)[..., 1]
        for row, i in enumerate(part):
            ends = [j - 1 for j, token in enumerate(texts[i]) if token == ID["\n"]][1:]
            values[i] = logits[row, ends].double().numpy()
    return values


def auc(scores, labels) -> float:
    """Area under the ROC curve, ties counted half; NaN if a class is missing."""
    from scipy.stats import rankdata

    labels = np.asarray(labels, bool)
    good, bad = labels.sum(), (~labels).sum()
    if not good or not bad:
        return float("nan")
    return float((rankdata(scores)[labels].sum() - good * (good + 1) / 2) / (good * bad))


def interval(values, seed: int = 0, resamples: int = 2000) -> list[float]:
    """[mean, low, high] of per-question figures, 95% percentile bootstrap over questions."""
    values = np.asarray([v for v in values if v == v], float)
    if not len(values):
        return [float("nan")] * 3
    draws = values[np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))].mean(1)
    return [round(float(x), 4) for x in (values.mean(), *np.percentile(draws, [2.5, 97.5]))]


def select(answers: list[str | None], weights) -> str | None:
    """The answer with the largest sum of weights; the first one wins a tie."""
    total: dict[str, float] = defaultdict(float)
    for answer, weight in zip(answers, weights):
        if answer is not None:
            total[answer] += weight
    return max(total, key=total.get) if total else None


def fixed_bin(pass_at_1: float) -> int:
    """1 (easiest, pass@1 >= 0.8) to 5 (hardest, < 0.2)."""
    return 5 - sum(pass_at_1 >= edge for edge in FIXED_EDGES)


def selection(rows: list[dict], solutions, values, n: int) -> dict[str, list[float]]:
    """Accuracy of the answer selected from the first n solutions of each question."""
    ways = {
        "majority": lambda v: 1.0,
        "weighted_last": lambda v: v[-1],
        "weighted_product": np.prod,
        "weighted_min": np.min,
    }
    hits: dict[str, list[float]] = {way: [] for way in [*ways, "argmax_last", "argmax_min"]}
    for row, texts, own in zip(rows, solutions, values):
        parsed = [parse_solution(text)[1] for text in texts[:n]]
        for way, weight in ways.items():
            hits[way].append(select(parsed, [weight(v) for v in own[:n]]) == row["answer"])
        for way, weight in (("argmax_last", ways["weighted_last"]), ("argmax_min", np.min)):
            hits[way].append(parsed[int(np.argmax([weight(v) for v in own[:n]]))] == row["answer"])
    return {way: interval(values_) for way, values_ in hits.items()}


def mark_quality(rows, solutions, values) -> dict:
    """AUCs of the model's own marks on unmarked work.

    `by_class`: steps whose earlier lines are all right, is this one right?  Within a class of facts, so
    that knowing which facts are hard does not help.  `so_far`: all lines, right so far?  `answer`: the
    last line's value against the answer's being right, within questions (mean over questions).
    """
    by_class, so_far = defaultdict(list), []
    within: dict[str, list[float]] = {"last": [], "product": [], "min": []}
    for row, texts, own in zip(rows, solutions, values):
        right = [parse_solution(text)[1] == row["answer"] for text in texts]
        for way, summary in (("last", lambda v: v[-1]), ("product", np.prod), ("min", np.min)):
            within[way].append(auc([summary(v) for v in own], right))
        for text, value in zip(texts, own):
            lines = text.split("\n")
            verdicts = right_so_far(row["question"], lines)
            so_far += zip(value, verdicts)
            for i, line in enumerate(lines):
                step = parse_step(line)
                if step and (i == 0 or verdicts[i - 1]):
                    by_class[FACTS[step[:2]].class_.author].append((value[i], step_is_right(line)))
    split = {c.author: tuple(zip(*by_class[c.author])) for c in CLASSES if by_class[c.author]}
    return {
        "by_class": {str(c): round(auc(*pair), 4) for c, pair in split.items()},
        "mean_value_right_wrong_by_class": {
            str(c): [
                round(float(np.mean([s for s, label in zip(*pair) if label == want])), 3) for want in (True, False)
            ]
            for c, pair in split.items()
        },
        "so_far": round(auc(*zip(*so_far)), 4),
        "answer_within_question": {way: interval(v) for way, v in within.items()},
    }


def measure(folder: Path, split: str, limit: int, n: int, seed: int) -> dict:
    rows = problems.read(split)[:limit]
    model = load(folder)
    begun = time.monotonic()
    solutions, generated = sample(model, [row["question"] for row in rows], n, seed)
    seconds = time.monotonic() - begun
    flat = marks(model, [(row["question"], text) for row, texts in zip(rows, solutions) for text in texts])
    values = [flat[i * n : (i + 1) * n] for i in range(len(rows))]

    by_k, by_bin, guess, clean, unparsed, short = defaultdict(list), defaultdict(list), {}, [], 0, 0
    p1, pn = [], []
    for row, texts in zip(rows, solutions):
        parsed = [parse_solution(text) for text in texts]
        right = [answer == row["answer"] for _, answer in parsed]
        unparsed += sum(answer is None for _, answer in parsed)
        short += sum(len(steps) != row["k"] for steps, _ in parsed)
        clean += [all(right_so_far(row["question"], text.split("\n"))) for text, good in zip(texts, right) if good]
        p1.append(np.mean(right))
        pn.append(float(any(right)))
        by_k[row["k"]].append(p1[-1])
        by_bin[fixed_bin(p1[-1])].append(pn[-1])
        guess[row["id"]] = 1 - (1 - 1 / P) ** n
    weights = sum(p.numel() for p in model.parameters())
    return {
        "model": folder.name,
        "split": split,
        "questions": len(rows),
        "samples": n,
        "seed": seed,
        "1_pass_at_1": interval(p1),
        "1_pass_at_1_by_k": {k: interval(v) for k, v in sorted(by_k.items())},
        "1_questions_by_fixed_bin": dict(sorted(Counter(map(fixed_bin, p1)).items())),
        f"2_pass_at_{n}": interval(pn),
        f"2_pass_at_{n}_by_fixed_bin": {b: interval(v) for b, v in sorted(by_bin.items())},
        f"2_guessing_pass_at_{n}": round(float(np.mean(list(guess.values()))), 4),
        "2_right_answers_with_all_steps_right": round(float(np.mean(clean)), 4),
        "2_unparsed": round(unparsed / (n * len(rows)), 4),
        "2_wrong_number_of_steps": round(short / (n * len(rows)), 4),
        "3_marks": mark_quality(rows, solutions, values),
        "4_first_look": {f"best_of_{m}": selection(rows, solutions, values, m) for m in (4, 16, 64) if m <= n},
        "8_parameters": weights,
        "8_megabytes": round((folder / "model.safetensors").stat().st_size / 1e6, 2),
        "8_sampled_tokens_per_second": round(generated / seconds),
    }


def beam_over_best_of_n(readers: list) -> dict:
    """Accuracy of beam less that of best-of-N weighted in round 1, paired by calibration question, runs averaged.

    `equal N` at the same number of final answers. `equal tokens`: best-of-N stands between its two
    budgets, on the logarithm of tokens, where it costs what the beam costs in that group of
    bins; only beams that cost no more than its largest budget are compared so.
    """
    from flywheel.measure.stats import bootstrap_mean
    from flywheel.search.beam import Beam
    from flywheel.search.best_of_n import BestOfN
    from flywheel.search.plan import Trial

    groups = {"all": range(1, 6), "bins 1-2": (1, 2), "bins 3-5": (3, 4, 5), **{f"bin {b}": (b,) for b in range(1, 6)}}
    gains: dict[str, dict[str, dict[str, list[float]]]] = {}
    for reader in readers:
        trials: dict[object, dict[str, Trial]] = defaultdict(dict)
        for trial in reader.read(Trial, "calibrate", 1):
            trials[trial.strategy][trial.question_id] = trial
        plain = sorted((s for s in trials if isinstance(s, BestOfN) and s.select == "weighted"), key=lambda s: s.n)
        for beam in (s for s in trials if isinstance(s, Beam)):
            for group, bins in groups.items():
                inside = [q for q, t in trials[beam].items() if t.bin in bins]
                cost = {s: float(np.mean([trials[s][q].tokens for q in inside])) for s in (beam, *plain)}
                same = next(s for s in plain if s.n == beam.n)
                pairs = {"equal N": [(1.0, same)]}
                if cost[beam] <= cost[plain[-1]]:
                    low = max((s for s in plain if cost[s] <= cost[beam]), key=lambda s: s.n, default=plain[0])
                    high = next((s for s in plain if s.n > low.n), low)
                    share = (
                        0.0
                        if high is low
                        else max(0.0, float(np.log(cost[beam] / cost[low]) / np.log(cost[high] / cost[low])))
                    )
                    pairs["equal tokens"] = [(1 - share, low), (share, high)]
                for how, mix in pairs.items():
                    at = gains.setdefault(f"{beam.name}, {how}", {}).setdefault(group, defaultdict(list))
                    for q in inside:
                        at[q].append(trials[beam][q].correct - sum(weight * trials[s][q].correct for weight, s in mix))
    return {
        title: {
            group: [round(x, 3) for x in bootstrap_mean([float(np.mean(v)) for v in at.values()])]
            for group, at in by_group.items()
        }
        for title, by_group in gains.items()
    }


def over_runs(runs: list[Path]) -> dict:
    """Properties 4 to 7, from finished runs; test questions but for 5, which is on the calibration questions."""
    from eval.studies import seeds, verifiers
    from flywheel.runs.run import Run

    opened = argparse.Namespace(runs=[Run(run) for run in runs], round=1)
    loop = seeds.measure(opened)
    first = loop["rounds"][1]
    found = {"4_verifiers": verifiers.measure(opened)}
    found["5_beam_over_best_of_n_weighted"] = beam_over_best_of_n(opened.runs)
    found["6_reviser"] = dict(enumerate(first["reviser"]))
    found["7_loop"] = {
        f"round {row['round']}": {k: v for k, v in row.items() if k not in ("search", "reviser", "round")}
        for row in loop["rounds"]
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SEED_MODEL)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--questions", type=int, default=208, help="the first so many of the split")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, nargs="+", metavar="RUN", help="finished runs: properties 4 to 7")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    with redirect_stdout(sys.stderr):  # libraries log to stdout as they are imported
        found = (
            over_runs(args.run)
            if args.run
            else measure(args.model, args.split, args.questions, args.samples, args.seed)
        )
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            print(name)
            for key, inner in value.items():
                print(f"    {key}: {inner}")
        else:
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
