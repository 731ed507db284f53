"""Pickles in a checkpoint are data, or refused before they run."""

import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from support.hostile import Malice, refusal, set_trap
from support.trainers import make_trainer
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from sft_pipeline.training import safe_unpickling
from sft_pipeline.utils.files import find_damage, write_checksums


@pytest.fixture
def trap(tmp_path) -> Malice:
    """Goes off where it is unpickled; the test asserts at its end that it did not."""
    with set_trap(tmp_path / "it-ran") as trap:
        yield trap


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, save_strategy="steps", save_steps=1, optim="adamw_torch").train()
    return folder / "checkpoint-1"


PICKLES = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


def resume(checkpoint: Path, folder: Path):
    return make_trainer(folder, optim="adamw_torch", max_steps=2).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("name", PICKLES)
def test_a_checkpoints_pickles_are_data_or_refused(name, checkpoint, tmp_path, trap):
    copied = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-1"))
    torch.save({"state": trap}, copied / name)
    assert find_damage(copied) == f"{name} differs from SHA256SUMS"
    (copied / "SHA256SUMS").unlink()
    write_checksums(copied)  # whoever can change a file can change its sum
    assert find_damage(copied) is None
    refusal(lambda: resume(copied, tmp_path / "out"), str(copied), "it names posix.mkdir", "it was not run")


def test_pickled_weights_in_a_checkpoint_are_not_run(checkpoint, tmp_path, trap):
    copied = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-1"))
    (copied / "model.safetensors").unlink()
    torch.save({"weights": trap}, copied / "pytorch_model.bin")
    refusal(lambda: resume(copied, tmp_path / "out"), "it names posix.mkdir")


def test_a_pickle_that_is_cut_off_is_one_line(checkpoint, tmp_path):
    copied = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-1"))
    for content in (b"", b"\x80\x02garbage"):
        (copied / "optimizer.pt").write_bytes(content)
        refusal(lambda: resume(copied, tmp_path / "out"), str(copied))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoints_pickles_are_data_or_refused(checkpoint, tmp_path, trap):
    """torch.distributed.checkpoint reads the metadata, and entries that are no tensors, as any pickle."""
    from torch.distributed import checkpoint as sharded

    copied = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-1"))
    sharded.save({"a": torch.zeros(3), "b": {"c": 1}}, checkpoint_id=copied / "optimizer_0", no_dist=True)
    assert resume(copied, tmp_path / "out").global_step == 2  # its own is data
    sharded.save({"a": torch.zeros(3), "b": {"c": trap}}, checkpoint_id=copied / "pytorch_model_fsdp_0", no_dist=True)
    refusal(lambda: resume(copied, tmp_path / "out"), "pytorch_model_fsdp_0/.metadata", "it names posix.mkdir")
    shutil.rmtree(copied / "pytorch_model_fsdp_0")
    (copied / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(trap))
    refusal(lambda: resume(copied, tmp_path / "out"), "optimizer_0/.metadata", "it names posix.mkdir")


@pytest.mark.parametrize("name", ["TORCH_CHANNELS_LAST", "__class__"])
def test_a_member_of_an_enum_is_data_as_python_3_11_2_writes_it(name):
    """As getattr of its class; getattr of anything else is none."""

    class Written:
        def __reduce__(self) -> tuple:
            return getattr, (_MEM_FORMAT_ENCODING, name)

    metadata = safe_unpickling._MetadataUnpickler(io.BytesIO(pickle.dumps(Written())))
    if name == "TORCH_CHANNELS_LAST":
        assert metadata.load() is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    else:
        with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL builtins\.getattr"):
            metadata.load()
