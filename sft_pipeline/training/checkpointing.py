"""`transformers.Trainer` with atomic checkpoints and exact resuming.

A checkpoint or a final model is complete or absent, whenever the process is killed (runs/checkpoints.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from sft_pipeline.config import get_output_dir
from sft_pipeline.runs.checkpoints import (
    SAVING_DIR,
    clear_leftovers,
    publish_checkpoint,
    publish_files,
    rotate_checkpoints,
)
from sft_pipeline.training.fsdp import ShardedTrainer
from sft_pipeline.training.rank_failures import is_collective_timeout
from sft_pipeline.utils.errors import SFTError, format_error
from sft_pipeline.utils.files import copy_folder_permissions
from sft_pipeline.utils.progress import show_elapsed_time


class CheckpointingTrainer(ShardedTrainer):
    """Writes every checkpoint and model to a staging folder, and renames it once all of it is on disk."""

    _is_saving_checkpoint = False
    _saved_step = -1

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
            with report_save_failure(run_dir / name, staging_dir):
                with show_elapsed_time(f"saving {name}", bool(self.args.disable_tqdm)):
                    super()._save_checkpoint(model, trial)
                self._set_best_checkpoint(run_dir, staging_dir)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    with show_elapsed_time(f"checking {name}", bool(self.args.disable_tqdm)):
                        publish_checkpoint(staging_dir, run_dir / name)
                    rotate_checkpoints(run_dir / name, self.args.save_total_limit, self.state.best_model_checkpoint)
                    clear_leftovers(run_dir)
        finally:
            self._is_saving_checkpoint = False
        self.accelerator.wait_for_everyone()
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; without `output_dir`, to a staging folder first, then into the run's output folder.

        Overridden because the library overwrites the old files in place: a kill or a full disk would destroy them.
        """
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        folder = get_output_dir(self.args)
        staging_dir = folder / SAVING_DIR / "model"
        with report_save_failure(folder / "the trained model", staging_dir):
            super().save_model(str(staging_dir), _internal_call)
            if self.args.should_save:
                publish_files(staging_dir, folder)
                clear_leftovers(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model without training_args.bin.

        Overridden because the library pickles the arguments into that file, including the hub token.
        """
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir) if output_dir else get_output_dir(self.args)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            copy_folder_permissions(folder)

    def _set_best_checkpoint(self, run_dir: Path, staging_dir: Path) -> None:
        """Replace the staging path of the best checkpoint in the trainer state by its final path."""
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best.is_dir() or best.name == staging_dir.name):
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(staging_dir / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint once it is published.

        Overridden because the library pushes from a thread, which would read the staging folder while it is renamed.
        """
        if not self._is_saving_checkpoint:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random states and the loss summed since the last log.

        Overridden because the library does not save that sum: the first loss logged after a resume would lack steps.
        """
        super()._save_rng_state(output_dir)
        running_loss = {"loss": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}
        self._get_running_loss_file(output_dir).write_text(json.dumps(running_loss), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random states and the loss summed since the last log.

        Overridden because it is the one method that the library calls right before the first step of a resumed run.
        """
        super()._load_rng_state(checkpoint)
        running_loss = self._load_running_loss(checkpoint) if checkpoint else None
        if running_loss is None:
            return
        self._tr_loss.fill_(running_loss["loss"])
        self._globalstep_last_logged = running_loss["last_logged_step"]
        # The library's train_loss covers the steps after the resume alone, so take out what was restored.
        self._total_loss_scalar = -running_loss["loss"]

    def _load_running_loss(self, checkpoint: str) -> dict[str, Any] | None:
        """Return the loss sum and last logged step of this process, or None if the checkpoint has none.

        With another number of processes each takes the mean over all files, which is the value that is logged.
        """
        files = list(Path(checkpoint).glob("running_loss_*.json"))
        if len(files) == self.args.world_size:
            files = [self._get_running_loss_file(checkpoint)]
        parts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return parts[0] | {"loss": sum(part["loss"] for part in parts) / len(parts)} if parts else None

    def _get_running_loss_file(self, folder: str) -> Path:
        """Return the file of this process in a checkpoint folder."""
        return Path(folder) / f"running_loss_{self.args.process_index}.json"


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
