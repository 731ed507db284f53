"""`transformers.Trainer` with atomic checkpoints and exact resuming.

A checkpoint or a final model is complete or absent, whenever the process is killed (runs/checkpoints.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from sft_pipeline.config import get_output_dir
from sft_pipeline.runs.checkpoints import (
    SAVING_DIR,
    clear_leftovers,
    hash_together,
    publish_checkpoint,
    publish_files,
    rotate_checkpoints,
)
from sft_pipeline.training.devices import count_local_processes
from sft_pipeline.training.fsdp import ShardedTrainer
from sft_pipeline.training.optimizers import use_evaluated_weights
from sft_pipeline.training.rank_failures import is_collective_timeout
from sft_pipeline.utils.distributed import run_on_all_processes
from sft_pipeline.utils.errors import SFTError, format_error
from sft_pipeline.utils.files import copy_folder_permissions, write_json
from sft_pipeline.utils.progress import show_elapsed_time
from sft_pipeline.utils.time_account import TimeAccount

RUNNING_LOSS_FILE = "running_loss.json"
STREAM_FILE = "stream.json"


@dataclass
class RunningLoss:
    """Sum of the losses of the steps since the last log, and their number. It is saved with each checkpoint.

    The library does not save its own sum, so that the first loss logged after a resume would lack steps.
    """

    total: float = 0.0
    steps: int = 0

    def add(self, loss: float) -> None:
        # Added in float32, as the library adds the losses of steps.
        self.total = float(np.float32(self.total) + np.float32(loss))
        self.steps += 1

    def pop_mean(self) -> float:
        mean = self.total / max(self.steps, 1)
        self.total, self.steps = 0.0, 0
        return mean

    @classmethod
    def read(cls, checkpoint: Path) -> RunningLoss:
        """Read what a checkpoint has; one that another trainer saved has none."""
        file = checkpoint / RUNNING_LOSS_FILE
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else cls()


def read_stream_state(checkpoint: str, is_streamed: bool) -> dict[str, Any] | None:
    """Read where the rows of a checkpoint's run with `streaming` go on; None for a run without.

    Raises SFTError if one of the two runs is streamed and the other is not: their rows come in other orders.
    """
    file = Path(checkpoint) / STREAM_FILE
    if file.is_file() != is_streamed:
        value = str(file.is_file()).lower()
        raise SFTError(f"resume_from_checkpoint {checkpoint}: of a run with streaming: {value}; set it so to resume")
    return json.loads(file.read_text(encoding="utf-8")) if is_streamed else None


class CheckpointingTrainer(ShardedTrainer):
    """Writes every checkpoint and model to a staging folder, and renames it once all of it is on disk."""

    _is_saving_checkpoint = False

    def __init__(self, *args: Any, times: TimeAccount | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times = times or TimeAccount()
        self.running_loss = RunningLoss()
        self.stream_state: dict[str, Any] | None = None  # of a run with `streaming`, after the current step

    def _get_output_dir(self, trial: Any) -> str:
        """Return the staging folder while a checkpoint is written.

        Overridden because `_save_checkpoint` of the library takes the folder it writes to from here alone.
        """
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / SAVING_DIR) if self._is_saving_checkpoint else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint to the staging folder, publish it, then delete older ones.

        Overridden because the library writes into the final folder, so that a kill leaves an incomplete checkpoint.
        """
        run_dir, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        staging_dir = run_dir / SAVING_DIR / name
        try:
            self._is_saving_checkpoint = True
            with self.times.measure("saving"), report_save_failure(run_dir / name, staging_dir):
                with show_elapsed_time(f"saving {name}", bool(self.args.disable_tqdm)):
                    super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    write_json(staging_dir / RUNNING_LOSS_FILE, asdict(self.running_loss))
                    if self.stream_state is not None:
                        write_json(staging_dir / STREAM_FILE, self.stream_state)
                self._set_best_checkpoint(run_dir, staging_dir)
                self.accelerator.wait_for_everyone()
                with show_elapsed_time(f"checking {name}", bool(self.args.disable_tqdm) or not self.args.should_save):
                    sums = hash_together(self.args, staging_dir, count_local_processes(self.args) or 1)
                run_on_all_processes(self.args, lambda: self._publish(staging_dir, run_dir / name, sums))
        finally:
            self._is_saving_checkpoint = False

    def _publish(self, staging_dir: Path, checkpoint: Path, sums: dict[str, str]) -> None:
        """Publish the checkpoint, then delete older ones; on the processes that save."""
        if self.args.should_save:
            publish_checkpoint(staging_dir, checkpoint, sums)
            rotate_checkpoints(checkpoint, self.args.save_total_limit, self.state.best_model_checkpoint)
            clear_leftovers(checkpoint.parent)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model without training_args.bin, a pickle of the arguments with the hub token.

        Without `output_dir` it is saved to a staging folder first, then into the run's output folder: the library
        overwrites the old files in place, and a kill or a full disk would destroy them.
        """
        use_evaluated_weights(self.optimizer)
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                (Path(output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                copy_folder_permissions(Path(output_dir))
            return
        folder = get_output_dir(self.args)
        staging_dir = folder / SAVING_DIR / "model"
        with report_save_failure(folder / "the trained model", staging_dir):
            self.save_model(str(staging_dir), _internal_call)
            if self.args.should_save:
                publish_files(staging_dir, folder)
                clear_leftovers(folder)

    def _set_best_checkpoint(self, run_dir: Path, staging_dir: Path) -> None:
        """Replace the staging path of the best checkpoint in the trainer state by its final path."""
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best.is_dir() or best.name == staging_dir.name):
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(staging_dir / TRAINER_STATE_NAME))


@contextmanager
def report_save_failure(path: Path, staging_dir: Path) -> Iterator[None]:
    """Raise SFTError if `path` cannot be written, and delete `staging_dir` to free the space it takes."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors raise errors of their own, not OSError, when the disk is full.
        if is_collective_timeout(error):
            raise
        shutil.rmtree(staging_dir, ignore_errors=True)
        raise SFTError(
            f"{path}: could not be saved ({format_error(error)}); older checkpoints are kept, "
            "resume with --resume_from_checkpoint auto"
        ) from error
