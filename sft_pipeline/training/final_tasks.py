"""Tasks of lm-evaluation-harness that the trained model is asked at the end of a run (`eval_tasks`)."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from sft_pipeline.config import SFTConfig
from sft_pipeline.evaluation.harness import LoadedTasks, TaskOptions, TaskScore, load_tasks, run_tasks
from sft_pipeline.inference.eval_mode import use_bf16_weights
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.utils.distributed import main_process_first, run_on_main_process
from sft_pipeline.utils.errors import format_error

if TYPE_CHECKING:
    from sft_pipeline.training.sft_trainer import SFTTrainer

logger = logging.getLogger(__name__)


def load_eval_tasks(args: SFTConfig) -> LoadedTasks | None:
    """Load the tasks of `eval_tasks`, one process after the first; None without tasks. Raises as `load_tasks`."""
    if not args.eval_tasks:
        return None
    with main_process_first(args):
        return load_tasks(TaskOptions(tuple(args.eval_tasks)))


def evaluate_tasks(trainer: SFTTrainer, tasks: LoadedTasks) -> dict[str, dict[str, Any]]:
    """Ask the model of `trainer` all questions, send the scores to the trackers, and return them by their names.

    The first process asks while the others wait. A model that is sharded and fits on no device is asked by all of them
    in step. An error is logged, and gives no scores: the run is not lost for it.
    """
    try:
        scores = _run_tasks(trainer, tasks)
    except Exception as error:
        logger.warning(
            "eval_tasks: not evaluated (%s: %s); the model is saved, and `evaluate %s --tasks %s` asks them again",
            *(type(error).__name__, format_error(error), trainer.args.output_dir, ",".join(trainer.args.eval_tasks)),
        )
        return {}
    metrics = {f"eval_{score.name.replace(', ', '_').replace(' ', '_')}": score.value for score in scores}
    trainer.log(metrics)
    return {score.name: score.as_json() for score in scores}


def _run_tasks(trainer: SFTTrainer, tasks: LoadedTasks) -> list[TaskScore]:
    args, sharded = trainer.args, trainer.evaluation.sharded

    def run(model: Any, collate: Any = trainer.data_collator) -> list[TaskScore]:
        disable_tqdm = bool(args.disable_tqdm) or not trainer.is_world_process_zero()
        return run_tasks(tasks, model, trainer.template, args.system_prompt, disable_tqdm, collate)[0]

    if sharded is None:
        is_bf16 = trainer.accelerator.mixed_precision == "bf16"
        with use_bf16_weights(trainer.model) if is_bf16 else nullcontext():
            return run_on_main_process(args, lambda: run(trainer.model))
    if sharded.fits():
        with sharded.gather(trainer.model) as whole:
            # The copy has the forward of its class.
            return run_on_main_process(args, lambda: (patch_loss_forward(whole), run(whole, None))[1])
    with sharded.keep_in_step(trainer.model):
        return run(trainer.model)
