"""Full disks, folders of others, too little memory, workers that hang, an end cut off: one line, nothing is lost."""

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
ENOUGH, TOO_MUCH = 2**20, 2**44  # bytes


class At(TrainerCallback):
    """Does something before step `step` + 1."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder, save_steps=STEPS)
    trainer.train()
    trainer.save_model()
    return folder


# A full disk.


@pytest.fixture
def limit_of_files():
    """limit_of_files(n): the system refuses to write a file beyond n bytes (EFBIG), until the test's end or n = -1."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def largest(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("fails", ["model.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_the_system_refuses_to_write_costs_no_older_one(fails, limit_of_files, whole, tmp_path):
    size = (whole / f"checkpoint-{STEPS}" / fails).stat().st_size
    with pytest.raises(SFTError) as told:
        build(tmp_path, [At(2, lambda: limit_of_files(size - 1))], save_total_limit=1).train()
    limit_of_files(-1)
    place = re.escape(str(tmp_path / "checkpoint-3"))
    line = rf"{place}: could not be saved \(.+\); older checkpoints are kept, --resume_from_checkpoint auto goes on"
    assert re.fullmatch(line, str(told.value)) and told.value.status == 2
    assert names(tmp_path / ".saving") == [], "what was written of it takes no room"
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    build(tmp_path, save_total_limit=1, save_steps=STEPS).train(resume_from_checkpoint=find_newest_checkpoint(tmp_path))
    assert_same_end(whole, tmp_path)


def test_a_model_that_the_system_refuses_to_write_costs_not_the_one_that_was_there(limit_of_files, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    trainer = build(tmp_path)
    limit_of_files(1000)
    said = rf"^{tmp_path / 'the trained model'}: could not be saved \(.*File too large.*\); older checkpoints are kept"
    with pytest.raises(SFTError, match=said):
        trainer.save_model()
    limit_of_files(-1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert {"model.safetensors", "config.json"} <= before.keys()


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(n): a folder on a disk of n bytes; called again, the disk has so many."""
    folder, made = tmp_path / "disk", []

    def mount(size: int) -> Path:
        folder.mkdir(exist_ok=True)
        options = f"{'remount,' if made else ''}size={size}"
        run = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if run.returncode:
            pytest.skip("needs the right to mount a disk; the limit of a file's size is tested above")
        made.append(folder)
        return folder

    yield mount
    if made:
        # Lazily: weights that were mapped from it are still in use.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full_and_then_is_not(small_disk, whole):
    checkpoint = sum(path.stat().st_size for path in (whole / f"checkpoint-{STEPS}").iterdir())
    folder = small_disk(int(3.6 * checkpoint))
    with pytest.raises(SFTError, match=r"checkpoint-\d: could not be saved \(.+\); older checkpoints are kept") as told:
        build(folder).train()
    kept = list(folder.glob("checkpoint-*"))
    assert kept and [find_damage(place) for place in kept] == [None] * len(kept)
    assert find_newest_checkpoint(folder) not in str(told.value)
    small_disk(int(30 * checkpoint))
    build(folder, save_steps=STEPS).train(resume_from_checkpoint=find_newest_checkpoint(folder))
    assert_same_end(whole, folder)


def failure(number: int, filename: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), filename)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            failure(errno.ENOSPC),
            "the disk of output_dir or of a cache: No space left on device; free some space; what was saved is kept",
        ),
        (
            failure(errno.EACCES, "/c/x"),
            f"/c/x: Permission denied; {CHOOSE_WRITABLE_FOLDER}; what was saved is kept",
        ),
        (failure(errno.EFBIG, "/c/x"), "/c/x: File too large; raise the limit (ulimit -f); what was saved is kept"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_library_s_failure_of_a_disk_is_one_line(wrapped, error, line, monkeypatch, capsys):
    """datasets wraps what happens to it."""

    def fail(*args):
        if wrapped:
            raise ValueError("An error occurred while generating the dataset") from error
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    with pytest.raises(SystemExit) as exit:
        main(["train"])
    assert exit.value.code == 2 and capsys.readouterr().err == f"sft-pipeline: {line}\n"


@pytest.mark.parametrize("error", [failure(errno.ENOENT), KeyError("a bug"), SFTError("one of ours")])
def test_other_errors_are_left_as_they_are(error):
    with pytest.raises(type(error)) as told, convert_file_errors():
        raise error
    assert told.value is error


# A folder of somebody else.


def said_to_nobody(function) -> str:
    """What `function` raises in a fork of this process that may not do more than others (root may write anywhere)."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            function()
        except SFTError as error:
            os.write(theirs, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    with open(ours, "rb") as pipe:
        return pipe.read().decode()


@pytest.fixture
def public(tmp_path):
    """A folder that everybody may go into and nobody may write to."""
    for place in (tmp_path, *tmp_path.parents):
        if place.stat().st_uid == os.getuid() and place != Path("/"):
            place.chmod(place.stat().st_mode | 0o055)
    yield tmp_path
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("inner", ["", "new/run"])
def test_an_output_folder_that_may_not_be_written_is_refused_before_anything_is_loaded(inner, public):
    (public / "taken").mkdir(mode=0o555)
    output = public / "taken" / inner
    parsed = parse_config(
        None, ["--model_name_or_path=m", "--train_data=d", "--use_cpu=true", f"--output_dir={output}"]
    )
    said = said_to_nobody(lambda: check_output_dir(*parsed))
    assert said == f"SFTError: output_dir {output}: no permission to write to {public / 'taken'}; choose another folder"


def test_a_cache_that_may_not_be_written_is_named(public, monkeypatch):
    monkeypatch.setenv("SFT_PIPELINE_CACHE", str(public / "cache"))
    public.chmod(0o555)

    def fill_cache():
        with convert_file_errors():
            Path(os.environ["SFT_PIPELINE_CACHE"], "encoded").mkdir(parents=True)

    said = said_to_nobody(fill_cache)
    assert said.startswith(
        f"SFTError: {public / 'cache'}: Permission denied; choose a writable folder with output_dir,"
    )


# Memory.


class Draws(torch.nn.Module):
    """An embedding whose forward pass draws random numbers, as dropout does, and takes so many bytes."""

    def __init__(self, embedding, takes):
        super().__init__()
        self.embedding, self.takes = embedding, takes

    def forward(self, ids):
        if self.training:
            torch.empty(self.takes, dtype=torch.uint8)
            random.random(), np.random.random()
        found = self.embedding(ids)
        return found * (1 + 0.1 * torch.rand_like(found)) if self.training else found


def drawing(trainer, takes: int = ENOUGH):
    trainer.model.model.embed_tokens = Draws(trainer.model.model.embed_tokens, takes)
    return trainer


def test_a_rehearsed_run_is_the_run_without_bit_by_bit(tmp_path, monkeypatch):
    drawing(build(tmp_path / "with", save_steps=STEPS, logging_steps=1)).train()
    monkeypatch.setattr("sft_pipeline.training.trainer.rehearse_heaviest_batch", lambda *args: None)
    drawing(build(tmp_path / "without", save_steps=STEPS, logging_steps=1)).train()
    compared, found = compare_checkpoints(*(tmp_path / name / f"checkpoint-{STEPS}" for name in ("with", "without")))
    assert found == [] and compared > 100


def test_an_evaluation_draws_nothing_that_training_draws(tmp_path):
    """At an epoch's end the checkpoint comes before the evaluation, and a run that goes on makes that one first."""
    keys = {"held_out": HELD_OUT, "eval_strategy": "epoch", "save_steps": 3, "max_steps": 6, "logging_steps": 1}
    drawing(build(tmp_path / "whole", **keys)).train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = drawing(build(tmp_path / "resumed", **keys, eval_on_start=True))
    assert needs_evaluation(str(checkpoint), resumed.args)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    compared, found = compare_checkpoints(*(tmp_path / name / "checkpoint-6" for name in ("whole", "resumed")))
    assert found == [] and compared > 100


def test_a_rehearsal_leaves_nothing_behind(tmp_path, monkeypatch):
    seen = []

    def observed(trainer, model, batches, step, size):
        model.eval()
        before = state_of(trainer, model)
        rehearsal_itself(trainer, model, batches, lambda *given: seen.append(given) or step(*given), size)
        assert state_of(trainer, model) == before
        assert all(weight.grad is None for weight in model.parameters()) and not model.training
        assert not trainer.optimizer.optimizer.state

    rehearsal_itself = memory.rehearse_heaviest_batch
    monkeypatch.setattr("sft_pipeline.training.trainer.rehearse_heaviest_batch", observed)
    trainer = drawing(build(tmp_path, save_strategy="no"))
    trainer.train()
    [(_, inputs, targets)] = seen
    rows = find_heaviest_batch(trainer.training_batches())
    assert inputs["row_lengths"].tolist()[1:] and targets == inputs["shift_labels"].ne(-100).sum()
    assert len(inputs["row_lengths"]) - 1 == len(rows)


def state_of(trainer, model) -> list[bytes]:
    tensors = [*model.state_dict().values(), torch.get_rng_state()]
    return [tensor.numpy().tobytes() for tensor in tensors] + [repr(random.getstate()), repr(np.random.get_state())]


@settings(deadline=None, max_examples=80)
@given(st.data(), st.lists(st.integers(1, 40), min_size=1, max_size=40), st.booleans())
def test_the_heaviest_batch_is_one_of_the_run_and_none_is_much_heavier(data, lengths, packed):
    sizes = {"rows": data.draw(st.integers(1, 5)), "accumulation": data.draw(st.integers(1, 3))}
    sizes |= {"processes": data.draw(st.integers(1, 3)), "epochs": data.draw(st.integers(1, 3))}
    tokens = data.draw(st.sampled_from([0, 60])) if packed else 0
    most = data.draw(st.sampled_from([-1, 2]))
    batches = StepBatchSampler(lengths, seed=1, packed=packed, tokens=tokens, max_steps=most, **sizes)
    steps = [step for epoch in range(batches.epochs) for step in batches.split_epoch(epoch)][
        : most if most > 0 else None
    ]
    every = [rows for step in steps for rows in batches.split_step(step)]
    found = find_heaviest_batch(batches)
    assert found in [list(rows) for rows in every]
    if packed:
        weights = [sum(lengths[row] for row in rows) for rows in every]
        assert sum(lengths[row] for row in found) >= max(weights) / 2
    else:
        area = [len(rows) * max([lengths[row] for row in rows], default=0) for rows in every]
        assert len(found) * max(lengths[row] for row in found) == max(area)


def test_rows_grouped_by_length_have_the_longest_together():
    assert find_heaviest_batch(StepBatchSampler([3, 9, 1, 8], seed=1, rows=2), longest_together=True) == [3, 1]


@pytest.mark.parametrize("budget", [0, 64])
def test_memory_that_does_not_suffice_is_known_before_the_first_step(budget, tmp_path):
    keys = {"rows": ROWS, "save_strategy": "no", "max_steps": 2}
    trainer = drawing(make_trainer(tmp_path, "packed", tokens_per_batch=budget, **keys), takes=TOO_MUCH)
    size = "tokens_per_batch" if budget else "per_device_train_batch_size"
    with pytest.raises(SFTError) as told:
        trainer.train()
    line = r"memory ran out in the heaviest batch \(\d rows, \d+ tokens\) \([\d.]+ GiB at most until then\): lower "
    line += rf"{size} \(and raise gradient_accumulation_steps by as much\) or max_length, "
    assert re.fullmatch(line + "or set activation_checkpointing: true; checkpoints are kept", str(told.value))
    assert told.value.status == 2 and trainer.state.global_step == 0


def test_memory_that_runs_out_later_names_the_step_and_keeps_the_checkpoints(tmp_path):
    trainer = drawing(build(tmp_path, activation_checkpointing=True))
    embedding = trainer.model.model.embed_tokens
    trainer.add_callback(At(2, lambda: setattr(embedding, "takes", TOO_MUCH)))
    said = r"^memory ran out in step 3 .*: lower per_device_train_batch_size .* or max_length; checkpoints are kept$"
    with pytest.raises(SFTError, match=said):
        trainer.train()
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_auto_find_batch_size_lowers_what_the_rehearsal_could_not_hold(tmp_path):
    keys = {"rows": ROWS, "auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 2}
    trainer = drawing(make_trainer(tmp_path, "padded", **keys))
    embedding, tried = trainer.model.model.embed_tokens, []

    def takes(module, args):
        tried.append(len(args[0]))
        module.takes = TOO_MUCH if len(args[0]) > 2 else ENOUGH

    embedding.register_forward_pre_hook(takes)
    trainer.train()
    assert tried[:3] == [4, 3, 2] and trainer.state.global_step == 2


def test_memory_that_runs_out_in_an_evaluation_names_its_own_key(tmp_path, monkeypatch):
    trainer = build(tmp_path, held_out=HELD_OUT)
    monkeypatch.setattr(trainer, "prediction_step", lambda *args, **kwargs: torch.empty(TOO_MUCH, dtype=torch.uint8))
    with pytest.raises(SFTError, match=r"^memory ran out in an evaluation .*: lower per_device_eval_batch_size; check"):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("error", "halved", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), False, SFTError),
        (MemoryError(), False, SFTError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), True, torch.OutOfMemoryError),
        (RuntimeError("shapes do not fit"), False, RuntimeError),
    ],
)
def test_which_errors_are_of_memory(error, halved, raised, tmp_path):
    args = build(tmp_path, auto_find_batch_size=halved).args
    with pytest.raises(raised), memory.handle_out_of_memory("step 1", "lower it", args):
        raise error


@pytest.mark.parametrize(("free", "level"), [(100.0, logging.INFO), (0.0, logging.WARNING)])
def test_the_rehearsal_says_what_it_took_and_what_is_left(free, level, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(memory, "measure_memory_gib", lambda device: (0.25, free))
    with caplog.at_level(logging.INFO, logger="sft_pipeline"):
        build(tmp_path, save_strategy="no").train()
    [record] = [record for record in caplog.records if "heaviest batch" in record.message]
    said = r"[\d.]+ GiB at most, \d\d\.\d\d stay free"
    if not free:
        said = r"training needs [\d.]+ GiB and 0.25 are there; it may be killed"
    assert re.fullmatch(rf"heaviest batch \(\d rows, \d+ tokens\): {said}", record.message) and record.levelno == level


def test_limits_of_control_groups_count(tmp_path):
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    assert list(memory.read_cgroup_limits(own, root)) == [float("inf")], "none, as on a Mac"
    own.write_text("0::/slurm/job\n")
    (root / "slurm" / "job").mkdir(parents=True)
    for group, limit in ((root / "slurm" / "job", "500"), (root / "slurm", "max"), (root, "900")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("100\n")
    assert list(memory.read_cgroup_limits(own, root)) == [float("inf"), 400, 800]
    taken, free = memory.measure_memory_gib(torch.device("cpu"))
    assert 0.01 < taken < 100 and free > 0


@pytest.mark.parametrize("optim", ["adamw_torch", "lomo", "galore_adamw_layerwise"])
def test_an_optimizer_that_steps_in_the_backward_pass_is_not_rehearsed(optim, tmp_path):
    trainer = build(tmp_path)
    trainer.args.optim = optim
    assert memory._steps_while_going_back(trainer) == (optim != "adamw_torch")


# A worker that hangs.


def work(process: int, folder: str) -> None:
    """One of two processes; the second sleeps in the third step for longer than the others wait."""
    rank_failures.GRACE = timedelta(seconds=1)
    group = torch.distributed.distributed_c10d
    callbacks = [At(1, lambda: group._set_pg_timeout(timedelta(seconds=5)))]
    if process == 1:
        callbacks.append(At(2, lambda: time.sleep(30)))
    try:
        with report_lost_ranks():
            build(Path(folder), callbacks, gradient_accumulation_steps=1, ddp_backend="gloo").train()
    except SFTError as told:
        (Path(folder) / f"told_{process}").write_text(str(told))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.real
def test_the_rank_that_hangs_is_named(tmp_path):
    context = run_ranks(work, 2, str(tmp_path), join=False)
    while context.processes[0].is_alive():
        time.sleep(0.1)
    for process in context.processes:
        process.kill()
    assert (tmp_path / "told_0").read_text() == (
        "rank 1 did not arrive where the other processes wait: it hangs or is gone; see its log; "
        "ddp_timeout says how long is waited, and checkpoints are kept"
    )
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


class Store:
    """Of the run's store, what is used; `gone` where the process that holds it is."""

    def __init__(self, *arrived: int, gone: bool = False):
        self.names, self.gone = {f"sft_pipeline/gave_up/{rank}" for rank in arrived}, gone

    def set(self, name, value):
        if self.gone:
            raise torch.distributed.DistNetworkError("connection reset")
        self.names.add(name)

    def wait(self, names, timeout):
        if not self.names >= set(names):
            raise torch.distributed.DistStoreError("wait timeout")

    def check(self, names):
        return self.names >= set(names)


@pytest.mark.parametrize(
    ("store", "ranks"), [(Store(1), [2, 3]), (Store(1, 2, 3), []), (Store(gone=True), [0]), (Store(3, 2), [1])]
)
def test_who_is_missing(store, ranks, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    assert find_missing_ranks(timedelta(seconds=1)) == ranks


def test_an_error_that_is_no_process_s_is_left_as_it_is():
    for text in ("Timed out waiting 5ms for recv operation", "shapes do not fit"):  # no process group here
        with pytest.raises(RuntimeError, match=text), report_lost_ranks():
            raise RuntimeError(text)


# The end.


@pytest.fixture(scope="module")
def config(write_config, tmp_path_factory) -> Path:
    keys = {"save_steps": 2, "max_steps": 4, "resume_from_checkpoint": "auto"}
    return write_config(tmp_path_factory.mktemp("config"), rows=8, **keys)


def run_train(config: Path, output: Path) -> dict:
    return train(*parse_config(str(config), [f"--output_dir={output}"]), Console(quiet=True))


def cut_off_after(moved: int):
    """`publish_files`, killed when it has moved so many files."""

    def publish(aside: Path, folder: Path) -> None:
        for file in sorted(aside.iterdir())[:moved]:
            file.replace(folder / file.name)
        raise Killed

    return publish


@pytest.mark.parametrize(("saves", "moved"), [(True, 0), (True, 3), (False, 3)])
def test_an_end_that_was_cut_off_is_made_by_the_same_command(saves, moved, config, tmp_path, monkeypatch):
    keys = yaml.safe_load(config.read_text()) | ({} if saves else {"save_strategy": "no"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys))
    run_train(tmp_path / "config.yaml", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("sft_pipeline.training.checkpointing.publish_files", cut_off_after(moved))
        run_train(tmp_path / "config.yaml", tmp_path / "cut")
    assert not (tmp_path / "cut" / RESULTS_FILE).exists() and (tmp_path / "cut" / ".saving" / "model").is_dir()
    results = run_train(tmp_path / "config.yaml", tmp_path / "cut")
    assert results["steps"] == 4 and names(tmp_path / "whole") == names(tmp_path / "cut")
    expected, found = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert expected.read_bytes() == found.read_bytes()


def test_files_that_are_published_are_old_or_new_wherever_it_is_cut_off(tmp_path):
    calls = None
    for at in range(20):
        aside, folder = tmp_path / str(at) / ".saving" / "model", tmp_path / str(at)
        (aside / "inner").mkdir(parents=True)
        for name in ("model.safetensors", "inner/config.json"):
            (aside / name).write_bytes(b"new")
        (folder / "model.safetensors").write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            calls = cut_off(patch, at, (Path, "replace"))
            try:
                publish_files(aside, folder)
                break
            except Killed:
                found = folder / "inner" / "config.json"
                assert not found.exists() or found.read_bytes() == b"new"
                assert (folder / "model.safetensors").read_bytes() in (b"old", b"new")
    assert calls == ["fsync", "fsync", "replace", "replace", "fsync"], "on the disk before they have their names"
    assert (folder / "model.safetensors").read_bytes() == b"new"
