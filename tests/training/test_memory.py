"""Memory: the rehearsal of the heaviest batch, errors that name what to lower, limits and peaks."""

import logging
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from support.resuming import HELD_OUT, ROWS, STEPS, build
from support.trainers import CallBeforeStep, make_trainer

from sft_pipeline.commands.verify_resume import compare_checkpoints
from sft_pipeline.data.batch_sampler import StepBatchSampler
from sft_pipeline.runs.checkpoints import find_newest_checkpoint, needs_evaluation
from sft_pipeline.training import memory
from sft_pipeline.training.memory import find_heaviest_batch, measure_peak_memory_gib, measure_peak_rss
from sft_pipeline.utils.errors import SFTError

SMALL, HUGE = 2**20, 2**44  # bytes


class RandomEmbedding(torch.nn.Module):
    """An embedding that draws random numbers, as dropout does, and allocates `num_bytes`."""

    def __init__(self, embedding, num_bytes):
        super().__init__()
        self.embedding, self.num_bytes = embedding, num_bytes

    def forward(self, ids):
        if self.training:
            torch.empty(self.num_bytes, dtype=torch.uint8)
            random.random(), np.random.random()
        output = self.embedding(ids)
        return output * (1 + 0.1 * torch.rand_like(output)) if self.training else output


def add_random_embedding(trainer, num_bytes: int = SMALL):
    trainer.model.model.embed_tokens = RandomEmbedding(trainer.model.model.embed_tokens, num_bytes)
    return trainer


def test_the_rehearsal_does_not_change_training(tmp_path, monkeypatch):
    add_random_embedding(build(tmp_path / "with", save_steps=STEPS, logging_steps=1)).train()
    monkeypatch.setattr("sft_pipeline.training.trainer.rehearse_heaviest_batch", lambda *args, **options: None)
    add_random_embedding(build(tmp_path / "without", save_steps=STEPS, logging_steps=1)).train()
    checkpoints = [tmp_path / name / f"checkpoint-{STEPS}" for name in ("with", "without")]
    num_compared, differences = compare_checkpoints(*checkpoints)
    assert differences == [] and num_compared > 100


def test_an_evaluation_does_not_change_random_states(tmp_path):
    """At the end of an epoch the checkpoint comes before the evaluation, which a resumed run makes first."""
    keys = {"held_out": HELD_OUT, "eval_strategy": "epoch", "save_steps": 3, "max_steps": 6, "logging_steps": 1}
    add_random_embedding(build(tmp_path / "whole", **keys)).train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = add_random_embedding(build(tmp_path / "resumed", **keys, eval_on_start=True))
    assert needs_evaluation(str(checkpoint), resumed.args)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    checkpoints = [tmp_path / name / "checkpoint-6" for name in ("whole", "resumed")]
    num_compared, differences = compare_checkpoints(*checkpoints)
    assert differences == [] and num_compared > 100


def test_the_rehearsal_restores_all_state(tmp_path, monkeypatch):
    step_calls = []

    def check_rehearsal(trainer, model, batches, step, size, repeats):
        model.eval()
        previous = get_state_bytes(trainer, model)
        rehearse(trainer, model, batches, lambda *args: step_calls.append(args) or step(*args), size)
        assert get_state_bytes(trainer, model) == previous
        assert all(weight.grad is None for weight in model.parameters()) and not model.training
        assert not trainer.optimizer.optimizer.state

    rehearse = memory.rehearse_heaviest_batch
    monkeypatch.setattr("sft_pipeline.training.trainer.rehearse_heaviest_batch", check_rehearsal)
    trainer = add_random_embedding(build(tmp_path, save_strategy="no"))
    trainer.train()
    [(_, inputs, targets)] = step_calls
    rows = find_heaviest_batch(trainer.build_batch_sampler())
    assert targets == inputs["shift_labels"].numel()
    assert len(inputs["target_counts"]) == len(rows)


def get_state_bytes(trainer, model) -> list[bytes]:
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    return [tensor.numpy().tobytes() for tensor in tensors] + [repr(random.getstate()), repr(np.random.get_state())]


@settings(deadline=None, max_examples=80)
@given(st.data(), st.lists(st.integers(1, 40), min_size=1, max_size=40), st.booleans())
def test_the_heaviest_batch_is_one_of_the_run_and_about_the_largest(data, lengths, packed):
    sizes = {"rows": data.draw(st.integers(1, 5)), "accumulation": data.draw(st.integers(1, 3))}
    sizes |= {"processes": data.draw(st.integers(1, 3))}
    tokens = data.draw(st.sampled_from([0, 60])) if packed else 0
    epochs, max_steps = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([-1, 2]))
    batches = StepBatchSampler(lengths, seed=1, packed=packed, tokens=tokens, **sizes)
    steps = [step for epoch in range(epochs) for step in batches.split_epoch(epoch)][
        : max_steps if max_steps > 0 else None
    ]
    micro_batches = [rows for step in steps for rows in batches.split_step(step)]
    heaviest = find_heaviest_batch(batches, epochs, max_steps)
    assert heaviest in [list(rows) for rows in micro_batches]
    if packed:
        weights = [sum(lengths[row] for row in rows) for rows in micro_batches]
        assert sum(lengths[row] for row in heaviest) >= max(weights) / 2
    else:
        area = [len(rows) * max([lengths[row] for row in rows], default=0) for rows in micro_batches]
        assert len(heaviest) * max(lengths[row] for row in heaviest) == max(area)


def test_with_group_by_length_the_longest_rows_form_a_batch():
    assert find_heaviest_batch(StepBatchSampler([3, 9, 1, 8], seed=1, rows=2), longest_together=True) == [3, 1]


@pytest.mark.parametrize("budget", [0, 64])
def test_too_little_memory_is_reported_before_the_first_step(budget, tmp_path):
    keys = {"rows": ROWS, "save_strategy": "no", "max_steps": 2}
    trainer = add_random_embedding(make_trainer(tmp_path, "packed", tokens_per_batch=budget, **keys), num_bytes=HUGE)
    size = "tokens_per_batch" if budget else "per_device_train_batch_size"
    with pytest.raises(SFTError) as error_info:
        trainer.train()
    message = r"out of memory in the heaviest batch \(\d rows, \d+ tokens\) \(peak [\d.]+ GiB\): lower "
    message += size + ("" if budget else r" \(and raise gradient_accumulation_steps by the same factor\)")
    message += " or max_length, "
    assert re.fullmatch(message + "or set activation_checkpointing: true; checkpoints are kept", str(error_info.value))
    assert error_info.value.status == 2 and trainer.state.global_step == 0


def test_out_of_memory_while_training_names_the_step_and_keeps_checkpoints(tmp_path):
    trainer = add_random_embedding(build(tmp_path, activation_checkpointing=True))
    embedding = trainer.model.model.embed_tokens
    trainer.add_callback(CallBeforeStep(2, lambda: setattr(embedding, "num_bytes", HUGE)))
    message = r"^out of memory in step 3 .*: lower per_device_train_batch_size .* or max_length; checkpoints are kept$"
    with pytest.raises(SFTError, match=message):
        trainer.train()
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_auto_find_batch_size_lowers_the_batch_size_in_the_rehearsal(tmp_path):
    keys = {"rows": ROWS, "auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 2}
    trainer = add_random_embedding(make_trainer(tmp_path, "padded", **keys))
    embedding, tried = trainer.model.model.embed_tokens, []

    def limit_batch_size(module, args):
        tried.append(len(args[0]))
        module.num_bytes = HUGE if len(args[0]) > 2 else SMALL

    embedding.register_forward_pre_hook(limit_batch_size)
    trainer.train()
    assert tried[:3] == [4, 3, 2] and trainer.state.global_step == 2


def test_out_of_memory_in_an_evaluation_names_the_eval_batch_size(tmp_path, monkeypatch):
    trainer = build(tmp_path, held_out=HELD_OUT)
    monkeypatch.setattr(trainer, "prediction_step", lambda *args, **kwargs: torch.empty(HUGE, dtype=torch.uint8))
    with pytest.raises(SFTError, match=r"^out of memory in an evaluation .*: lower per_device_eval_batch_size; check"):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("error", "auto_find", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), False, SFTError),
        (MemoryError(), False, SFTError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), True, torch.OutOfMemoryError),
        (RuntimeError("shapes do not fit"), False, RuntimeError),
    ],
)
def test_which_errors_are_out_of_memory(error, auto_find, raised, tmp_path):
    args = build(tmp_path, auto_find_batch_size=auto_find).args
    with pytest.raises(raised), memory.handle_out_of_memory("step 1", "lower it", args):
        raise error


@pytest.mark.parametrize(("free", "level"), [(100.0, logging.INFO), (0.0, logging.WARNING)])
def test_the_rehearsal_logs_peak_and_remaining_memory(free, level, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(memory, "measure_memory_gib", lambda device: (0.25, free))
    with caplog.at_level(logging.INFO, logger="sft_pipeline"):
        build(tmp_path, save_strategy="no").train()
    [record] = [record for record in caplog.records if "heaviest batch" in record.message]
    message = r"peak [\d.]+ GiB, \d\d\.\d\d GiB left"
    if not free:
        message = r"training needs [\d.]+ GiB, 0.25 GiB are available; the process may be killed"
    assert re.fullmatch(rf"heaviest batch \(\d rows, \d+ tokens\): {message}", record.message)
    assert record.levelno == level


def test_cgroup_limits(tmp_path):
    cgroup_file, root = tmp_path / "cgroup", tmp_path / "fs"
    assert list(memory.read_cgroup_limits(cgroup_file, root)) == [float("inf")], "no cgroups, as on macOS"
    cgroup_file.write_text("0::/slurm/job\n")
    (root / "slurm" / "job").mkdir(parents=True)
    for group, limit in ((root / "slurm" / "job", "500"), (root / "slurm", "max"), (root, "900")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("100\n")
    assert list(memory.read_cgroup_limits(cgroup_file, root)) == [float("inf"), 400, 800]
    taken, free = memory.measure_memory_gib(torch.device("cpu"))
    assert 0.01 < taken < 100 and free > 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_leaves_out_the_process_that_started_this_one():
    large = np.ones(600 * 2**20, dtype=np.uint8)
    assert measure_peak_rss() > large.nbytes
    code = "from sft_pipeline.training.memory import measure_peak_rss; print(measure_peak_rss())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) < large.nbytes


def test_peak_memory_is_read_without_proc(tmp_path):
    assert measure_peak_rss(tmp_path / "none") >= 0.9 * measure_peak_rss()


def test_peak_memory_is_of_the_gpu_if_there_is_one(monkeypatch):
    assert 0.05 < measure_peak_memory_gib() < 1000
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    assert measure_peak_memory_gib() == 1.5
