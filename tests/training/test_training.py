"""The trainings, in one process on a tiny model; `test_training_slow.py` has the several-process claims."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import training_worker as lab

from flywheel.errors import UserError, explain
from flywheel.ledger import Ledger
from flywheel.models.prm import aggregate
from flywheel.models.weights import attention_width
from flywheel.recipe import ModelSpec, TrainSpec
from flywheel.training import Example, Job, PrmExample, TrainingError, train_prm, train_sft
from flywheel.training.checkpoints import points
from flywheel.training.examples import order, share, targets
from flywheel.training.scores import calibration, score_all, within_question_auc
from flywheel.training.stored import stored

ROOT = Path(__file__).resolve().parents[2]
SPEC = dict(epochs=2, batch_size=16, micro_batch_size=16, learning_rate=5e-3, evals=4, max_length=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return lab.make_base(tmp_path_factory.mktemp("base"))


def job(base: str, out: Path, kind: str = "sft", keep: str = "best", **spec) -> dict:
    """A training as `training_worker.run` takes it."""
    return {"kind": kind, "base": base, "out": str(out), "keep": keep, "spec": {**SPEC, **spec}}


def weights(adapter: str | Path) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(adapter) / "adapter_model.safetensors")


def apart(one: str | Path, other: str | Path) -> float:
    """The largest difference between two adapters."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)


def make_job(base: str, out: Path, keep: str = "last", role: str = "policy", **spec) -> Job:
    return Job(ModelSpec(base=base, lora_rank=4), TrainSpec(**{**SPEC, **spec}), out, 0, keep, role, Ledger("t", 1))


def interrupt(*args):
    raise KeyboardInterrupt


def watch_resumes(patch) -> list[str | None]:
    """What every training from now on resumes from."""
    from flywheel.training.losses import SftTrainer

    seen, train = [], SftTrainer.train

    def watched(self, resume_from_checkpoint):
        seen.append(resume_from_checkpoint)
        return train(self, resume_from_checkpoint=resume_from_checkpoint)

    patch.setattr(SftTrainer, "train", watched)
    return seen


# ---- order, shares ------------------------------------------------------------------


def test_every_epoch_sees_every_example_in_full_batches_of_like_length():
    lengths = [10 + (7 * i) % 50 for i in range(96)]
    indices = order(lengths, 8, 3, seed=1)
    assert len(indices) == 3 * 96 and all(indices.count(i) == 3 for i in range(96))
    padded = sum(8 * max(lengths[i] for i in indices[at : at + 8]) for at in range(0, len(indices), 8))
    assert padded < 1.25 * 3 * sum(lengths)
    assert indices != order(lengths, 8, 3, seed=2) and indices == order(lengths, 8, 3, seed=1)


@pytest.mark.parametrize("count, epochs, steps", [(10, 1, 2), (10, 0.5, 1), (3, 2, 1), (100, 20, 250), (1, 1, 1)])
def test_epochs_run_on_so_that_no_batch_is_short(count, epochs, steps):
    indices = order([5] * count, 8, epochs, seed=0)
    assert len(indices) == 8 * steps
    seen = [indices.count(i) for i in range(count)]
    assert max(seen) - min(seen) <= 1


def test_the_micro_batch_is_the_largest_that_divides():
    assert share(32, 32, 1) == (32, 1)
    assert share(32, 32, 2) == (16, 1)
    assert share(32, 12, 1) == (8, 4)
    assert share(6, 4, 2) == (3, 1)
    with pytest.raises(TrainingError, match="batch_size 32 cannot be shared by 3 processes"):
        share(32, 8, 3)


def test_validation_points_end_with_the_last_step():
    assert points(100, 4) == [25, 50, 75, 100]
    assert points(3, 8) == [1, 2, 3]


# ---- supervised fine-tuning ---------------------------------------------------------


def test_sft_learns_charges_every_token_and_leaves_a_loadable_adapter(base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ledger = Ledger("distill", 1)
    report = lab.run(job(base, tmp_path, epochs=6), ledger)
    losses = [point["eval_loss"] for point in report.curve if point["eval_loss"] is not None]
    assert len(losses) == 5 and losses[-1] < 0.9 * losses[0]
    assert report.best.eval_loss == min(losses[1:])
    assert report.steps == 38 and report.epochs == pytest.approx(38 * 16 / 100)

    rows = {row["purpose"]: row for row in ledger.rows()}
    examples = lab.sft_examples(100, 0)
    lengths = [len(e.tokens) for e in examples]
    assert rows["train"]["trained"] == report.tokens == sum(lengths[i] for i in order(lengths, 16, 6, 0))
    attended = sum(length * (length + 1) // 2 for length in (lengths[i] for i in order(lengths, 16, 6, 0)))
    weights = 4 * report.parameters + 2 * report.parameters_trained  # LoRA: no gradients of the frozen weights
    assert rows["train"]["flops"] == weights * report.tokens + 12 * attention_width(base) * attended
    assert rows["validate"]["scored"] == 5 * sum(len(e.tokens) for e in lab.sft_examples(21, 1))

    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert token_loss(model, lab.sft_examples(21, 1)) == pytest.approx(report.best.eval_loss, abs=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert token_loss(plain, lab.sft_examples(21, 1)) == pytest.approx(losses[0], abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "report.json"]


def token_loss(model, examples) -> float:
    """Mean over all trained tokens, one example at a time."""
    import torch

    total = count = 0
    for example in examples:
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([example.tokens])).logits[0].log_softmax(-1)
        for at in range(example.loss_from, len(example.tokens)):
            total, count = total - logp[at - 1, example.tokens[at]].item(), count + 1
    return total / count


@pytest.mark.parametrize("kind", ["sft", "prm"])
def test_out_of_memory_halves_the_micro_batch_and_trains_the_same_model(base, tmp_path, monkeypatch, capsys, kind):
    """At the second step the device is too small for 8 at once; the trainings differ in nothing but rounding."""
    import torch

    from flywheel.training import trainer

    whole = lab.run(job(base, tmp_path / "whole", kind, epochs=1, micro_batch_size=4), Ledger("distill", 1))
    usual, sizes = trainer.SftTrainer.training_step, []

    def small_device(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > 4 and len(sizes) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.SftTrainer, "training_step", small_device)
    ledger = Ledger("distill", 1)
    halved = lab.run(job(base, tmp_path / "halved", kind, epochs=1, micro_batch_size=8), ledger)
    assert "out of memory at a micro batch of 8; going on with 4, the batch stays 16" in capsys.readouterr().out
    assert not (tmp_path / "halved/micro_batch.json").exists()
    assert sizes[:4] == [8] * 4 and set(sizes[4:]) == {4}
    assert halved.steps == whole.steps and apart(tmp_path / "whole/adapter", tmp_path / "halved/adapter") < 1e-4
    assert [row["trained"] for row in ledger.rows() if row["purpose"] == "train"] == [whole.tokens]


def test_out_of_memory_at_a_micro_batch_of_one_is_one_clear_line(base, tmp_path, monkeypatch):
    from flywheel.training import trainer

    def no_room(self, *args, **kwargs):
        raise RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(trainer.SftTrainer, "training_step", no_room)
    with pytest.raises(TrainingError, match="out of memory at a micro batch of 1: "):
        lab.run(job(base, tmp_path, epochs=1, micro_batch_size=2), Ledger("distill", 1))


@pytest.mark.parametrize("kind", ["sft", "prm"])
def test_accumulation_changes_nothing(base, tmp_path, kind):
    one = lab.run(job(base, tmp_path / "1", kind), Ledger("t", 1))
    two = lab.run(job(base, tmp_path / "2", kind, micro_batch_size=8), Ledger("t", 1))
    assert apart(tmp_path / "1/adapter", tmp_path / "2/adapter") < 1e-5
    # what a rank left alone with its half of every batch would make is far beyond that tolerance
    lab.run(job(base, tmp_path / "half", kind, batch_size=8, micro_batch_size=8, epochs=1), Ledger("t", 1))
    assert apart(tmp_path / "1/adapter", tmp_path / "half/adapter") > 1e-2
    assert [p["step"] for p in one.curve] == [p["step"] for p in two.curve]
    for a, b in zip(one.curve, two.curve):
        assert (a["loss"] or 0) == pytest.approx(b["loss"] or 0, abs=1e-5)
        assert (a["eval_loss"] or 0) == pytest.approx(b["eval_loss"] or 0, abs=1e-5)


def test_on_a_cpu_the_logits_of_trained_positions_train_as_trl_does(base, tmp_path, monkeypatch):
    from flywheel.training.losses import SFTTrainer, SftTrainer

    ours = lab.run(job(base, tmp_path / "ours"), Ledger("t", 1))
    monkeypatch.setattr(SftTrainer, "compute_loss", SFTTrainer.compute_loss)
    trl = lab.run(job(base, tmp_path / "trl"), Ledger("t", 1))
    assert apart(tmp_path / "ours/adapter", tmp_path / "trl/adapter") < 1e-5
    for a, b in zip(ours.curve, trl.curve, strict=True):
        assert (a["loss"] or 0) == pytest.approx(b["loss"] or 0, abs=1e-5)
        assert (a["eval_loss"] or 0) == pytest.approx(b["eval_loss"] or 0, abs=1e-5)


def test_scheduler_and_gradient_clip_reach_the_training(base, tmp_path):
    def trained(name, **spec):
        lab.run(job(base, tmp_path / name, "sft", epochs=1, **spec), Ledger("t", 1))
        return tmp_path / name / "adapter"

    cosine = trained("cosine")
    assert apart(cosine, trained("again", scheduler="cosine", max_grad_norm=1.0)) == 0
    assert apart(cosine, trained("linear", scheduler="linear")) > 1e-4
    assert apart(cosine, trained("clipped", max_grad_norm=1e-8)) > 1e-4  # below Adam's epsilon


@pytest.mark.parametrize("kind", ["sft", "prm"])
def test_a_training_may_begin_with_another_adapter(base, tmp_path, kind):
    first = lab.run(job(base, tmp_path / "first", kind), Ledger("t", 1))
    then = lab.run(
        {**job(base, tmp_path / "then", kind, epochs=1, learning_rate=1e-9), "start": str(tmp_path / "first/adapter")},
        Ledger("t", 1),
    )
    assert apart(tmp_path / "first/adapter", tmp_path / "then/adapter") < 1e-6
    assert then.curve[0]["eval_loss"] == pytest.approx(first.best.eval_loss, abs=1e-5)


@pytest.mark.parametrize("kind", ["sft", "prm"])
def test_examples_on_disk_train_what_a_list_of_them_trains(base, tmp_path, kind):
    listed = lab.run(job(base, tmp_path / "listed", kind, epochs=1), Ledger("t", 1))
    make = {"sft": lab.sft_examples, "prm": lab.prm_examples}[kind]
    parts = [("fit", example) for example in make(100, 0)] + [("held", example) for example in make(21, 1)]
    fit, check = stored(tmp_path / "examples", 0, iter(parts)).split({"held"})
    role = {"sft": "policy", "prm": "prm"}[kind]
    made = Job(
        ModelSpec(base=base, lora_rank=4, lora_alpha=8),
        TrainSpec(**{**SPEC, "epochs": 1}),
        tmp_path / "mapped",
        0,
        "best",
        role,
        Ledger("t", 1),
    )
    mapped = train_sft(fit, check, made) if kind == "sft" else train_prm(fit, check, lab.LABELS, made)
    assert mapped.curve == listed.curve and apart(tmp_path / "listed/adapter", tmp_path / "mapped/adapter") == 0
    digests = [json.loads((tmp_path / n / "report.json").read_text())["fingerprint"] for n in ("listed", "mapped")]
    assert digests[0] == digests[1]


def test_what_is_kept(base, tmp_path):
    kept = {keep: lab.run(job(base, tmp_path / keep, keep=keep), Ledger("t", 1)) for keep in ("best", "last", "all")}
    everything = kept["all"].checkpoints
    assert [c.step for c in everything] == points(kept["all"].steps, 4)
    assert all(weights(c.path) for c in everything)
    assert kept["last"].best.step == kept["last"].steps
    assert apart(kept["last"].best.path, everything[-1].path) == 0
    lowest = min(everything, key=lambda c: c.eval_loss)
    assert kept["best"].best.step == lowest.step and apart(kept["best"].best.path, lowest.path) == 0
    assert not (tmp_path / "best/checkpoints").exists()


def test_an_altered_checkpoint_is_never_unpickled(base, tmp_path, monkeypatch, caplog):
    """Its files must be those that were written; the one before it serves."""
    from flywheel.training import trainer

    saved, save = [], trainer.Schedule.on_save

    def killed(self, args, state, control, **kwargs):
        save(self, args, state, control, **kwargs)
        saved.append(state.global_step)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Schedule, "on_save", killed)
        lab.run(job(base, tmp_path), Ledger("t", 1))
    last = tmp_path / f"trainer/checkpoint-{saved[1]}"
    data = bytearray((last / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (last / "optimizer.pt").write_bytes(data)
    resumed_from = watch_resumes(monkeypatch)
    lab.run(job(base, tmp_path), Ledger("t", 1))
    assert resumed_from == [str(tmp_path / f"trainer/checkpoint-{saved[0]}")]
    assert f"checkpoint-{saved[1]}: damaged or altered" in caplog.text


def test_an_interrupted_training_resumes_to_the_same_adapter(base, tmp_path, monkeypatch):
    from flywheel.training import trainer

    whole = lab.run(job(base, tmp_path / "whole"), Ledger("t", 1))
    saved, save = [], trainer.Schedule.on_save

    def killed(self, args, state, control, **kwargs):
        if len(saved) == 2:  # the third checkpoint is on disk, its mark is not
            raise KeyboardInterrupt
        saved.append(state.global_step)
        save(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Schedule, "on_save", killed)
        lab.run(job(base, tmp_path / "cut"), Ledger("t", 1))
    unmarked = tmp_path / "cut/trainer/checkpoint-10"
    assert unmarked.exists()
    (unmarked / "adapter_model.safetensors").write_bytes(b"half")

    resumed_from, ledger = watch_resumes(monkeypatch), Ledger("t", 1)
    resumed = lab.run(job(base, tmp_path / "cut"), ledger)
    assert Path(resumed_from[0]).name == f"checkpoint-{saved[1]}"
    assert resumed.steps == whole.steps and resumed.tokens == whole.tokens
    assert [p["step"] for p in resumed.curve] == [p["step"] for p in whole.curve]
    assert apart(tmp_path / "whole/adapter", tmp_path / "cut/adapter") < 1e-6
    assert ledger.tokens() == whole.tokens + 5 * sum(len(e.tokens) for e in lab.sft_examples(21, 1))


def test_other_settings_do_not_resume_what_lies_there(base, tmp_path, monkeypatch, caplog):
    from flywheel.training import trainer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "conclude", interrupt)
        lab.run(job(base, tmp_path / "a"), Ledger("t", 1))
    assert (tmp_path / "a/trainer").exists()
    report = lab.run(job(base, tmp_path / "a", learning_rate=1e-3), Ledger("t", 1))
    assert "data or settings changed since it was interrupted" in caplog.text
    lab.run(job(base, tmp_path / "b", learning_rate=1e-3), Ledger("t", 1))
    assert apart(tmp_path / "a/adapter", tmp_path / "b/adapter") == 0 and report.steps == 13


def test_killed_between_the_last_step_and_the_report_it_only_concludes(base, tmp_path, monkeypatch):
    from flywheel.training import trainer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "conclude", interrupt)
        lab.run(job(base, tmp_path), Ledger("t", 1))
    again = lab.run(job(base, tmp_path), Ledger("t", 1))
    assert again.steps == 13 and again.curve[-1]["step"] == 13
    before = (tmp_path / "adapter/adapter_model.safetensors").stat().st_mtime_ns
    assert lab.run(job(base, tmp_path), Ledger("t", 1)) == again
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_mtime_ns == before


def test_bad_training_data_is_one_clear_line(base, tmp_path):
    good = Example((4, 5, 6, 1), 2)
    with pytest.raises(TrainingError, match="training example 1 has 65 tokens, max_length is 64"):
        train_sft([good, Example((5,) * 65, 2)], [], make_job(base, tmp_path))
    with pytest.raises(TrainingError, match="training example 0: loss_from 4 leaves nothing"):
        train_sft([Example((4, 5, 6, 1), 4)], [], make_job(base, tmp_path))
    with pytest.raises(TrainingError, match="no training example for the policy") as caught:
        train_sft([], [], make_job(base, tmp_path))
    assert isinstance(caught.value, UserError) and explain(caught.value) == "no training example for the policy"
    with pytest.raises(TrainingError, match="keep='best' chooses by validation loss"):
        train_sft([good], [], make_job(base, tmp_path, "best"))
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_training(base, tmp_path):
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at step .* lower the learning rate"):
        train_sft(lab.sft_examples(32, 0), [], make_job(base, tmp_path, learning_rate=1e30, epochs=4))
    assert not (tmp_path / "adapter").exists()


# ---- process reward model -----------------------------------------------------------


def soft_bce(base: str, adapter: str | None, examples: list[PrmExample]) -> float:
    """From the definition: full softmax at each read, renormalised over the two labels."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    total = weight = 0.0
    for example in examples:
        with torch.no_grad():
            probabilities = model(input_ids=torch.tensor([example.tokens])).logits[0].softmax(-1)
        for at, value, w in zip(example.reads, example.values, example.weights or [1.0] * len(example.reads)):
            good, bad = (probabilities[at - 1, label].item() for label in lab.LABELS)
            p = good / (good + bad)
            total -= w * (value * math.log(p) + (1 - value) * math.log(1 - p))
            weight += w
    return total / weight


def test_prm_loss_is_soft_bce_over_all_reads_and_its_curve_starts_at_the_base(base, tmp_path):
    report = lab.run(job(base, tmp_path, "prm", epochs=8), Ledger("t", 1))
    held_out = lab.prm_examples(21, 1)
    assert report.curve[0] == {
        "step": 0,
        "loss": None,
        "eval_loss": pytest.approx(soft_bce(base, None, held_out), abs=1e-5),
    }
    assert report.best.eval_loss == pytest.approx(soft_bce(base, report.best.path, held_out), abs=1e-5)
    assert report.best.eval_loss < 0.9 * report.curve[0]["eval_loss"]


def test_prm_weights_count(base, tmp_path):
    plain = lab.prm_examples(8, 3)
    weighted = [PrmExample(e.tokens, e.reads, e.values, tuple(0.5 + i for i in range(len(e.reads)))) for e in plain]
    report = train_prm(plain, weighted, lab.LABELS, make_job(base, tmp_path, "best", "prm", epochs=1))
    assert report.curve[0]["eval_loss"] == pytest.approx(soft_bce(base, None, weighted), abs=1e-5)
    assert report.curve[0]["eval_loss"] != pytest.approx(soft_bce(base, None, plain), abs=1e-5)


def test_score_all_reads_every_step_in_one_pass_in_the_order_given(base):
    examples = lab.prm_examples(30, 5)
    scores = score_all(base, None, examples, lab.LABELS, batch_size=7)
    assert [len(s) for s in scores] == [len(e.reads) for e in examples]
    for example, mine in zip(examples, scores):
        for read, value, score in zip(example.reads, example.values, mine):
            alone = PrmExample(example.tokens[:read], (read,), (value,))
            p = math.exp(-soft_bce(base, None, [PrmExample(alone.tokens, (read,), (1.0,))]))
            assert score == pytest.approx(p, abs=1e-5)


def test_a_trained_prm_and_its_base_judge_held_out_examples_at_the_end(base, tmp_path, monkeypatch):
    """As a fresh model with the chosen adapter would; a training that ended before it told them tells the same."""
    from flywheel.training.losses import PrmTrainer

    examples = lab.prm_examples(21, 5)
    asked = (lab.prm_examples(100, 0), lab.prm_examples(21, 1), lab.LABELS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PrmTrainer, "held_values", interrupt)
        train_prm(*asked, make_job(base, tmp_path, "best", "prm"), examples)
    job = make_job(base, tmp_path, "best", "prm")
    report = train_prm(*asked, job, examples)
    for values, adapter in zip(report.held, (report.best.path, None), strict=True):
        fresh = score_all(base, adapter, examples, lab.LABELS)
        assert [pytest.approx(scores, abs=1e-5) for scores in fresh] == values
    assert report.held[0] != report.held[1]
    assert train_prm(*asked, make_job(base, tmp_path, "best", "prm"), examples).held == [
        [list(scores) for scores in values] for values in report.held
    ]
    validated = sum(p["eval_loss"] is not None for p in report.curve) * sum(len(e.tokens) for e in asked[1])
    [scored] = [row["scored"] for row in job.ledger.rows() if row["purpose"] == "validate"]
    assert scored == validated + 2 * sum(len(e.tokens) for e in examples)


@pytest.mark.parametrize(
    "example, complaint",
    [
        (PrmExample((4, 5, 6), (2,), (-1.0,)), "outside \\[0, 1\\]"),
        (PrmExample((4, 5, 6), (2,), (math.nan,)), "outside \\[0, 1\\]"),
        (PrmExample((4, 5, 6), (4,), (0.5,)), "outside its 3 tokens"),
        (PrmExample((4, 5, 6), (0,), (0.5,)), "outside its 3 tokens"),
        (PrmExample((4, 5, 6), (1, 2), (0.5,)), "2 reads, 1 values"),
        (PrmExample((4, 5, 6), (), ()), "0 reads"),
        (PrmExample((4, 5, 6), (1,), (0.5,), (0.0,)), "weights"),
        (PrmExample((4,) * 65, (1,), (0.5,), question_id="q7"), "question q7\\) has 65 tokens"),
    ],
)
def test_bad_prm_data_is_one_clear_line(base, tmp_path, example, complaint):
    with pytest.raises(TrainingError, match=complaint):
        train_prm([example], [], lab.LABELS, make_job(base, tmp_path, role="prm"))


def test_targets_are_the_values_or_the_fraction_of_the_success_probability_that_survives_each_step():
    values = (0.5, 0.75, 0.25, 0.0, 0.0)
    assert targets(values, 0.25, "value", 8) == (values, (1.0,) * 5)
    progress, weights = targets(values, 0.25, "progress", 8)
    assert progress == (1.0, 1.0, pytest.approx(1 / 3), 0.0, 0.0)  # a step that helps is good, not better than good
    assert weights == (0.25, 0.5, 0.75, 0.25, 0.0)  # after a hopeless step there is nothing to learn
    assert sum(targets((0.0, 0.0), 0.0, "progress", 8)[1]) == 0


def test_the_product_of_progress_is_the_last_value_over_the_first():
    falling = (0.8, 0.4, 0.4, 0.1)
    assert math.prod(targets(falling, 1.0, "progress", 8)[0]) == pytest.approx(falling[-1])


def test_the_odds_of_ratios_multiply_to_the_last_value_over_the_first_whatever_the_length():
    for values in ((0.8, 0.4, 0.4, 0.1), (0.5, 1.0), (0.25,) * 9):
        labels, weights = targets(values, 0.5, "ratio", 8)
        first, *shrunk = ((value * 8 + 0.5) / 9 for value in (0.5, *values))
        assert math.prod(label / (1 - label) for label in labels) == pytest.approx(shrunk[-1] / first)
        assert weights == pytest.approx((first, *shrunk[:-1]))
    assert targets((0.5, 0.5), 0.5, "ratio", 8)[0] == (0.5, 0.5)  # steps that change nothing
    assert min(targets((0.0, 0.0), 0.0, "ratio", 8)[0]) > 0  # no odds of 0 and no division by it


def test_noise_lowers_the_product_of_progress_with_every_step_but_not_the_odds_of_ratios():
    """Neutral steps at a true value of 0.5, seen through 8 rollouts each: four steps against one."""
    rng = random.Random(0)

    def scores(target: str, how: str, steps: int) -> float:
        seen = ([sum(rng.random() < 0.5 for _ in range(8)) / 8 for _ in range(steps)] for _ in range(2000))
        made = [aggregate(targets(values, 0.5, target, 8)[0], how) for values in seen]
        return sum(made) / len(made)

    assert scores("progress", "product", 1) - scores("progress", "product", 4) > 0.3
    assert abs(scores("ratio", "odds", 1) - scores("ratio", "odds", 4)) < 0.03


def test_auc_is_within_questions():
    # a: 2 of 2 pairs ordered; b: 1 of 2; c has one class only; across questions the order is bad
    scores = [0.9, 0.3, 0.2, 0.5, 0.4, 0.6, 0.99]
    correct = [True, False, False, True, False, False, False]
    questions = ["a", "a", "a", "b", "b", "b", "c"]
    assert within_question_auc(scores, correct, questions) == pytest.approx((1.0 + 0.5) / 2)
    assert within_question_auc([0.1], [True], ["a"]) is None


def test_calibration_bins():
    table = calibration([0.05, 0.15, 0.19, 1.0], [0, 0, 1, 1], bins=10)
    assert [(row["low"], row["n"], row["target"]) for row in table] == [(0.0, 1, 0), (0.1, 2, 0.5), (0.9, 1, 1)]
    assert table[1]["score"] == pytest.approx(0.17)
    with pytest.raises(ValueError):
        calibration([1.2], [1])


# ---- surroundings -------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_config_parses(path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args = launch_command_parser().parse_args(["--config_file", str(path), "x.py"])
    args, defaults, _ = _validate_launch_command(args)
    assert defaults.num_processes == args.num_processes >= 1
    # more than one process must go through torchrun or DeepSpeed, else no rank is told who it is
    assert (args.num_processes > 1) == bool(args.multi_gpu or args.use_deepspeed)


def test_the_modules_that_stages_import_do_not_import_torch():
    names = "flywheel.training, flywheel.training.examples, flywheel.training.checkpoints"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
