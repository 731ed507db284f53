"""Full disks, missing permissions, too little memory, hanging workers, an interrupted end: one line, no lost data."""

import errno
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.processes import run_ranks
from support.resuming import HELD_OUT, ROWS, STEPS, Killed, assert_same_end, build, cut_off, names
from support.trainers import make_trainer
from transformers import TrainerCallback

from sft_pipeline import cli
from sft_pipeline.cli import main
from sft_pipeline.commands.verify_resume import compare_checkpoints
from sft_pipeline.config import parse_config
from sft_pipeline.data.batch_sampler import StepBatchSampler
from sft_pipeline.runs.checkpoints import find_newest_checkpoint, needs_evaluation, publish_files
from sft_pipeline.runs.output_dir import RESULTS_FILE, check_output_dir
from sft_pipeline.train import train
from sft_pipeline.training import memory, rank_failures
from sft_pipeline.training.memory import find_heaviest_batch
from sft_pipeline.training.rank_failures import find_missing_ranks, report_lost_ranks
from sft_pipeline.utils.errors import CHOOSE_WRITABLE_FOLDER, SFTError, convert_file_errors
from sft_pipeline.utils.files import find_damage

NOBODY = 65534
SMALL, HUGE = 2**20, 2**44  # bytes


class CallBeforeStep(TrainerCallback):
    """Call `action` before step `step` + 1."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder, save_steps=STEPS)
    trainer.train()
    trainer.save_model()
    return folder


# A full disk.


@pytest.fixture
def set_file_size_limit():
    """set_file_size_limit(n): writing a file beyond n bytes fails (EFBIG), until the end of the test or n = -1."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, previous)


@pytest.mark.parametrize("fails", ["model.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_cannot_be_written_leaves_older_ones_intact(fails, set_file_size_limit, whole, tmp_path):
    size = (whole / f"checkpoint-{STEPS}" / fails).stat().st_size
    with pytest.raises(SFTError) as error_info:
        build(tmp_path, [CallBeforeStep(2, lambda: set_file_size_limit(size - 1))], save_total_limit=1).train()
    set_file_size_limit(-1)
    path = re.escape(str(tmp_path / "checkpoint-3"))
    remedy = "older checkpoints are kept, resume with --resume_from_checkpoint auto"
    message = rf"{path}: could not be saved \(.+\); {remedy}"
    assert re.fullmatch(message, str(error_info.value)) and error_info.value.status == 2
    assert names(tmp_path / ".saving") == [], "the incomplete checkpoint takes no space"
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    build(tmp_path, save_total_limit=1, save_steps=STEPS).train(resume_from_checkpoint=find_newest_checkpoint(tmp_path))
    assert_same_end(whole, tmp_path)


def test_a_model_that_cannot_be_written_leaves_the_old_one_intact(set_file_size_limit, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    previous = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    trainer = build(tmp_path)
    set_file_size_limit(1000)
    message = (
        rf"^{tmp_path / 'the trained model'}: could not be saved \(.*File too large.*\); older checkpoints are kept"
    )
    with pytest.raises(SFTError, match=message):
        trainer.save_model()
    set_file_size_limit(-1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == previous
    assert {"model.safetensors", "config.json"} <= previous.keys()


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(n): a folder on a disk of n bytes; called again, the disk is resized."""
    folder, mounted = tmp_path / "disk", []

    def mount(size: int) -> Path:
        folder.mkdir(exist_ok=True)
        options = f"{'remount,' if mounted else ''}size={size}"
        run = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if run.returncode:
            pytest.skip("needs permission to mount a disk; a limit of the file size is tested above")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        # Lazily, since weights mapped from it are still in use.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_on_a_full_disk_resumes_when_it_has_space(small_disk, whole):
    checkpoint = sum(path.stat().st_size for path in (whole / f"checkpoint-{STEPS}").iterdir())
    folder = small_disk(int(3.6 * checkpoint))
    with pytest.raises(
        SFTError, match=r"checkpoint-\d: could not be saved \(.+\); older checkpoints are kept"
    ) as error_info:
        build(folder).train()
    checkpoints = list(folder.glob("checkpoint-*"))
    assert checkpoints and [find_damage(path) for path in checkpoints] == [None] * len(checkpoints)
    assert find_newest_checkpoint(folder) not in str(error_info.value)
    small_disk(int(30 * checkpoint))
    build(folder, save_steps=STEPS).train(resume_from_checkpoint=find_newest_checkpoint(folder))
    assert_same_end(whole, folder)


def make_os_error(number: int, filename: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), filename)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            make_os_error(errno.ENOSPC),
            "the disk of output_dir or of a cache: No space left on device; free some space; what was saved is kept",
        ),
        (
            make_os_error(errno.EACCES, "/c/x"),
            f"/c/x: Permission denied; {CHOOSE_WRITABLE_FOLDER}; what was saved is kept",
        ),
        (
            make_os_error(errno.EFBIG, "/c/x"),
            "/c/x: File too large; raise the limit (ulimit -f); what was saved is kept",
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_disk_errors_of_any_library_are_one_line(wrapped, error, line, monkeypatch, capsys):
    """datasets wraps the error."""

    def fail(*args):
        if wrapped:
            raise ValueError("An error occurred while generating the dataset") from error
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    with pytest.raises(SystemExit) as exit:
        main(["train"])
    assert exit.value.code == 2 and capsys.readouterr().err == f"sft-pipeline: {line}\n"


@pytest.mark.parametrize("error", [make_os_error(errno.ENOENT), KeyError("a bug"), SFTError("one of ours")])
def test_other_errors_are_not_converted(error):
    with pytest.raises(type(error)) as error_info, convert_file_errors():
        raise error
    assert error_info.value is error


# Folders without permission.


def run_as_nobody(function) -> str:
    """Return the error of `function` in a fork of this process as user nobody (root may write anywhere)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            function()
        except SFTError as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        return pipe.read().decode()


@pytest.fixture
def public(tmp_path):
    """A folder that every user can enter, and only its owner can write to."""
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    yield tmp_path
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("inner", ["", "new/run"])
def test_an_output_folder_without_write_permission_is_refused(inner, public):
    (public / "taken").mkdir(mode=0o555)
    output = public / "taken" / inner
    parsed = parse_config(
        None, ["--model_name_or_path=m", "--train_data=d", "--use_cpu=true", f"--output_dir={output}"]
    )
    message = run_as_nobody(lambda: check_output_dir(*parsed))
    assert (
        message == f"SFTError: output_dir {output}: no permission to write to {public / 'taken'}; choose another folder"
    )


def test_a_cache_without_write_permission_is_named(public, monkeypatch):
    monkeypatch.setenv("SFT_PIPELINE_CACHE", str(public / "cache"))
    public.chmod(0o555)

    def fill_cache():
        with convert_file_errors():
            Path(os.environ["SFT_PIPELINE_CACHE"], "encoded").mkdir(parents=True)

    message = run_as_nobody(fill_cache)
    assert message.startswith(
        f"SFTError: {public / 'cache'}: Permission denied; choose a writable folder with output_dir,"
    )


# Memory.


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
    monkeypatch.setattr("sft_pipeline.training.trainer.rehearse_heaviest_batch", lambda *args: None)
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

    def check_rehearsal(trainer, model, batches, step, size):
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
    assert inputs["row_lengths"].tolist()[1:] and targets == inputs["shift_labels"].ne(-100).sum()
    assert len(inputs["row_lengths"]) - 1 == len(rows)


def get_state_bytes(trainer, model) -> list[bytes]:
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    return [tensor.numpy().tobytes() for tensor in tensors] + [repr(random.getstate()), repr(np.random.get_state())]


@settings(deadline=None, max_examples=80)
@given(st.data(), st.lists(st.integers(1, 40), min_size=1, max_size=40), st.booleans())
def test_the_heaviest_batch_is_one_of_the_run_and_about_the_largest(data, lengths, packed):
    sizes = {"rows": data.draw(st.integers(1, 5)), "accumulation": data.draw(st.integers(1, 3))}
    sizes |= {"processes": data.draw(st.integers(1, 3)), "epochs": data.draw(st.integers(1, 3))}
    tokens = data.draw(st.sampled_from([0, 60])) if packed else 0
    max_steps = data.draw(st.sampled_from([-1, 2]))
    batches = StepBatchSampler(lengths, seed=1, packed=packed, tokens=tokens, max_steps=max_steps, **sizes)
    steps = [step for epoch in range(batches.epochs) for step in batches.split_epoch(epoch)][
        : max_steps if max_steps > 0 else None
    ]
    micro_batches = [rows for step in steps for rows in batches.split_step(step)]
    heaviest = find_heaviest_batch(batches)
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
    message += rf"{size} \(and raise gradient_accumulation_steps by the same factor\) or max_length, "
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


@pytest.mark.parametrize("optim", ["adamw_torch", "lomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_the_backward_pass(optim, tmp_path):
    trainer = build(tmp_path)
    trainer.args.optim = optim
    assert memory._has_step_in_backward(trainer) == (optim != "adamw_torch")


# A worker that hangs.


def run_worker(process: int, folder: str) -> None:
    """Train in one of two processes; the second sleeps in the third step for longer than the timeout."""
    rank_failures.GRACE_PERIOD = timedelta(seconds=1)
    group = torch.distributed.distributed_c10d
    callbacks = [CallBeforeStep(1, lambda: group._set_pg_timeout(timedelta(seconds=5)))]
    if process == 1:
        callbacks.append(CallBeforeStep(2, lambda: time.sleep(30)))
    try:
        with report_lost_ranks():
            build(Path(folder), callbacks, gradient_accumulation_steps=1, ddp_backend="gloo").train()
    except SFTError as error:
        (Path(folder) / f"error_{process}").write_text(str(error))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.real
def test_the_rank_that_hangs_is_named(tmp_path):
    context = run_ranks(run_worker, 2, str(tmp_path), join=False)
    while context.processes[0].is_alive():
        time.sleep(0.1)
    for process in context.processes:
        process.kill()
    assert (tmp_path / "error_0").read_text() == (
        "rank 1 did not reach the collective that the other ranks wait in: it hangs or has exited; see its log; "
        "ddp_timeout sets how long ranks wait; checkpoints are kept"
    )
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


class Store:
    """A stand-in for the store of a process group. unreachable: the process that holds it has exited."""

    def __init__(self, *arrived: int, unreachable: bool = False):
        self.keys, self.unreachable = {f"sft_pipeline/timed_out/{rank}" for rank in arrived}, unreachable

    def set(self, key, value):
        if self.unreachable:
            raise torch.distributed.DistNetworkError("connection reset")
        self.keys.add(key)

    def wait(self, keys, timeout):
        if not self.keys >= set(keys):
            raise torch.distributed.DistStoreError("wait timeout")

    def check(self, keys):
        return self.keys >= set(keys)


@pytest.mark.parametrize(
    ("store", "ranks"), [(Store(1), [2, 3]), (Store(1, 2, 3), []), (Store(unreachable=True), [0]), (Store(3, 2), [1])]
)
def test_find_missing_ranks(store, ranks, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    assert find_missing_ranks(timedelta(seconds=1)) == ranks


def test_errors_of_one_process_are_not_converted():
    for text in ("Timed out waiting 5ms for recv operation", "shapes do not fit"):  # no process group here
        with pytest.raises(RuntimeError, match=text), report_lost_ranks():
            raise RuntimeError(text)


# An interrupted end.


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    keys = {"save_steps": 2, "max_steps": 4, "resume_from_checkpoint": "auto"}
    return write_config(tmp_path_factory.mktemp("config"), rows=8, **keys)


def run_train(config: Path, output: Path) -> dict:
    return train(*parse_config(str(config), [f"--output_dir={output}"]), Console(quiet=True))


def make_interrupted_publish(moved: int):
    """Return a `publish_files` that is killed after `moved` files."""

    def publish(aside: Path, folder: Path) -> None:
        for file in sorted(aside.iterdir())[:moved]:
            file.replace(folder / file.name)
        raise Killed

    return publish


@pytest.mark.parametrize(("saves", "moved"), [(True, 0), (True, 3), (False, 3)])
def test_an_interrupted_end_is_completed_by_the_same_command(saves, moved, config, tmp_path, monkeypatch):
    keys = yaml.safe_load(config.read_text()) | ({} if saves else {"save_strategy": "no"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys))
    run_train(tmp_path / "config.yaml", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("sft_pipeline.training.checkpointing.publish_files", make_interrupted_publish(moved))
        run_train(tmp_path / "config.yaml", tmp_path / "cut")
    assert not (tmp_path / "cut" / RESULTS_FILE).exists() and (tmp_path / "cut" / ".saving" / "model").is_dir()
    results = run_train(tmp_path / "config.yaml", tmp_path / "cut")
    assert results["steps"] == 4 and names(tmp_path / "whole") == names(tmp_path / "cut")
    expected, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert expected.read_bytes() == resumed.read_bytes()


def test_an_interrupted_publish_leaves_each_file_old_or_new(tmp_path):
    calls = None
    for num_calls in range(20):
        aside, folder = tmp_path / str(num_calls) / ".saving" / "model", tmp_path / str(num_calls)
        (aside / "inner").mkdir(parents=True)
        for name in ("model.safetensors", "inner/config.json"):
            (aside / name).write_bytes(b"new")
        (folder / "model.safetensors").write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            calls = cut_off(patch, num_calls, (Path, "replace"))
            try:
                publish_files(aside, folder)
                break
            except Killed:
                config_file = folder / "inner" / "config.json"
                assert not config_file.exists() or config_file.read_bytes() == b"new"
                assert (folder / "model.safetensors").read_bytes() in (b"old", b"new")
    assert calls == ["fsync", "fsync", "replace", "replace", "fsync"], "synced to disk before they are renamed"
    assert (folder / "model.safetensors").read_bytes() == b"new"
