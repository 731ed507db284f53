"""`transformers.Trainer` whose checkpoints and final model are whole or absent (checkpoints.py), and go on exactly."""

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
    """Whatever is written is written aside, and moved when all of it is on the disk."""

    _aside = False  # while a checkpoint is being written
    _saved_step = -1

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / SAVING_DIR) if self._aside else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Whole or absent; older ones go after that."""
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        aside = run / SAVING_DIR / name
        try:
            self._aside = True
            with report_save_failure(run / name, aside):
                with show_elapsed_time(f"saving {name}", bool(self.args.disable_tqdm)):
                    super()._save_checkpoint(model, trial)
                self._name_best(run, aside)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    with show_elapsed_time(f"checking {name}", bool(self.args.disable_tqdm)):
                        publish_checkpoint(aside, run / name)
                    rotate_checkpoints(run / name, self.args.save_total_limit, self.state.best_model_checkpoint)
                    clear_leftovers(run)
        finally:
            self._aside = False
        self.accelerator.wait_for_everyone()
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Aside first, where it is the run's and no checkpoint's: a kill or a full disk costs no older file."""
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        folder = get_output_dir(self.args)
        aside = folder / SAVING_DIR / "model"
        with report_save_failure(folder / "the trained model", aside):
            super().save_model(str(aside), _internal_call)
            if self.args.should_save:
                publish_files(aside, folder)
                clear_leftovers(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Without the library's pickle of the arguments, which no one needs and which holds the hub's token."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir) if output_dir else get_output_dir(self.args)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            copy_folder_permissions(folder)

    def _name_best(self, run: Path, aside: Path) -> None:
        """The best checkpoint by the name that it will have."""
        best = run / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best.is_dir() or best.name == aside.name):
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(aside / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushed when it is whole: the hub's thread would read a folder that is renamed meanwhile."""
        if not self._aside:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """And the loss since the last log, which else would begin anew in a run that goes on."""
        super()._save_rng_state(output_dir)
        running = {"loss": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}
        self._running_loss_file(output_dir).write_text(json.dumps(running), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called once, before the first step of a run that goes on."""
        super()._load_rng_state(checkpoint)
        running = self._running_loss(checkpoint) if checkpoint else None
        if running is None:
            return
        self._tr_loss.fill_(running["loss"])
        self._globalstep_last_logged = running["last_logged_step"]
        # The library's train_loss is of the steps from here on alone.
        self._total_loss_scalar = -running["loss"]

    def _running_loss(self, checkpoint: str) -> dict[str, Any] | None:
        """What this process had saved; where others or fewer had, each takes the mean, which is what is logged."""
        files = list(Path(checkpoint).glob("running_loss_*.json"))
        if len(files) == self.args.world_size:
            files = [self._running_loss_file(checkpoint)]
        parts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return parts[0] | {"loss": sum(part["loss"] for part in parts) / len(parts)} if parts else None

    def _running_loss_file(self, folder: str) -> Path:
        return Path(folder) / f"running_loss_{self.args.process_index}.json"


@contextmanager
def report_save_failure(place: Path, aside: Path) -> Iterator[None]:
    """Raises SFTError where the disk fails while `aside` is written, which then takes no more room there."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors have errors of their own for a disk that is full.
        if is_collective_timeout(error):
            raise
        shutil.rmtree(aside, ignore_errors=True)
        raise SFTError(
            f"{place}: could not be saved ({format_error(error)}); older checkpoints are kept, "
            "--resume_from_checkpoint auto goes on"
        ) from error
