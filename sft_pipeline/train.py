"""A run from its config to its results, read top to bottom.

    sft-pipeline train configs/quickstart.yaml

The loss is three hops away: trainer.py, model/loss_forward.py, model/linear_cross_entropy.py.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from sft_pipeline.config import SFTArguments, build_config_record, get_output_dir
from sft_pipeline.data.chat_templates import Template, build_template
from sft_pipeline.data.pipeline import PreparedData, prepare_data
from sft_pipeline.data.preview import build_preview, print_row
from sft_pipeline.data.shards import map_shards
from sft_pipeline.data.tokenizer_export import build_saved_tokenizer
from sft_pipeline.evaluation.step_results import compute_changes, join_answers
from sft_pipeline.model.loading import load_model, load_tokenizer, resolve_model, set_special_tokens
from sft_pipeline.reports.console_summary import print_results
from sft_pipeline.reports.html import write_report
from sft_pipeline.runs.output_dir import (
    PREVIEW_FILE,
    RESULTS_FILE,
    TEMPLATE_FILE,
    check_output_dir,
    copy_evaluations,
    create_output_dir,
)
from sft_pipeline.training.builder import build_trainer, count_trainable_parameters
from sft_pipeline.training.evaluation_callback import EvaluationCallback
from sft_pipeline.training.memory import measure_peak_memory_gib
from sft_pipeline.training.rank_failures import report_lost_ranks
from sft_pipeline.training.trackers import drop_missing_trackers, start_trackers
from sft_pipeline.training.trainer import SupervisedTrainer
from sft_pipeline.utils.console import print_line
from sft_pipeline.utils.files import get_cache_dir, write_json
from sft_pipeline.utils.progress import show_elapsed_time

logger = logging.getLogger(__name__)

PACKAGES = ("sft_pipeline", "torch", "transformers", "datasets", "accelerate", "tokenizers")


@report_lost_ranks()
def train(sft: SFTArguments, training: TrainingArguments, console: Console) -> dict[str, Any]:
    """Fine-tune as told; leaves model, tokenizer, `run.yaml`, `results.json` and its page in the output folder."""
    checkpoint = check_output_dir(sft, training)
    if checkpoint:
        logger.info("going on from %s", checkpoint)
    config = build_config_record(sft, training)
    drop_missing_trackers(training)
    path = resolve_model(sft.model_name_or_path, get_cache_dir())
    tokenizer = load_tokenizer(path, sft.trust_remote_code)
    template = build_template(sft.template, tokenizer)
    data = load_training_data(sft, template, training)
    set_seed(training.seed)
    model = load_model(path, sft.trust_remote_code)
    set_special_tokens(model, tokenizer, template.stop_token_id)
    create_output_dir(sft, training)
    copy_evaluations(checkpoint, training)
    training.eval_on_start = training.eval_on_start if checkpoint is None else needs_evaluation(checkpoint, training)
    if training.process_index == 0:
        print_row(data.train[0], tokenizer, "first training row", console)
        write_json(get_output_dir(training) / PREVIEW_FILE, build_preview(data.train, tokenizer))
    trainer = build_trainer(sft, training, model, template, data)

    evaluation = EvaluationCallback(trainer, template, data.held_out_messages, sft)
    trainer.add_callback(evaluation)
    trainable = count_trainable_parameters(trainer.model)  # before adapters may be merged

    rows = {
        "train": asdict(data.train_stats),
        "held_out": asdict(data.held_out_stats) if data.held_out_stats else None,
    }
    with start_trackers(
        trainer, checkpoint, {"sft": asdict(sft), "data": rows, "supervised_share": compute_supervised_shares(data)}
    ):
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        speed = trainer.tokens_per_second()
        last_eval = evaluate_final_model(trainer, evaluation) if data.held_out else {}

    with show_elapsed_time(f"saving {training.output_dir}", bool(training.disable_tqdm)):
        save_run(trainer, template, sft)
    results = {
        "eval_loss": {"before": get_first_eval_loss(trainer), "after": last_eval.get("eval_loss")},
        "train_loss": outcome.training_loss,
        "trainable_parameters": trainable,
        "steps": trainer.state.global_step,
        "tokens_per_second": round(speed, 1),
        "peak_memory_gib": measure_peak_memory_gib(),
        "seconds": round(outcome.metrics["train_runtime"], 1),
        **compare_with_start(evaluation),
        "rows": rows,
        "loss_curve": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
        "versions": {name: version(name) for name in PACKAGES},
        "seed": training.seed,
        "config": config,
    }
    if trainer.is_world_process_zero():
        folder = get_output_dir(training)
        write_json(folder / RESULTS_FILE, results)
        print_results(results, str(folder), console)
        print_line(console, f"all of it as a page: {write_report([folder])}")
    return results


def load_training_data(sft: SFTArguments, template: Template, training: TrainingArguments) -> PreparedData:
    """Mapped where they were prepared; else encoded by the first process of each machine, whose cache others read."""
    if sft.prepared_data:
        return map_shards(sft, template, training)
    with training.main_process_first(desc="encoding"):
        return prepare_data(sft, template)


def needs_evaluation(checkpoint: str, training: TrainingArguments) -> bool:
    """Whether the checkpoint was saved at a step that is evaluated, and the run then stopped before that was done."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history):
        return False
    if training.eval_strategy == IntervalStrategy.EPOCH:
        return state.epoch == int(state.epoch) and training.eval_delay <= state.epoch
    due = training.eval_strategy == IntervalStrategy.STEPS and state.global_step % state.eval_steps == 0
    return due and training.eval_delay <= state.global_step


def compute_supervised_shares(data: PreparedData) -> dict[str, float]:
    """What part of the tokens is supervised."""
    accounts = {"train": data.train_stats, "held_out": data.held_out_stats}
    return {name: one.supervised_tokens / one.tokens for name, one in accounts.items() if one}


def get_first_eval_loss(trainer: SupervisedTrainer) -> float | None:
    """The held-out loss at step 0."""
    return next((entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry), None)


def evaluate_final_model(trainer: SupervisedTrainer, evaluation: EvaluationCallback) -> dict[str, float]:
    """Held-out metrics of the model as it will be saved; not computed again if the last evaluation was wholly of it."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    step = trainer.state.global_step
    if last.get("step") == step and evaluation.is_complete(step) and not trainer.args.load_best_model_at_end:
        return last
    return trainer.evaluate()


def compare_with_start(evaluation: EvaluationCallback) -> dict[str, Any]:
    """The metrics of the last evaluation, their changes since step 0, and the answers of both."""
    before, after = evaluation.before, evaluation.evaluations[-1] if evaluation.evaluations else None
    return {
        "metrics": after and after.metrics,
        "before_and_after": compute_changes(before, after) if before and after else {},
        "answers": join_answers(before, after) if after else [],
    }


def save_run(trainer: SupervisedTrainer, template: Template, sft: SFTArguments) -> None:
    """Model (or adapters), tokenizer with the trained chat template, and what `chat` needs to know."""
    trainer.processing_class = build_saved_tokenizer(template, sft.system_prompt)
    if sft.lora and sft.lora_merge:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        record = {"template": sft.template, "system_prompt": sft.system_prompt}
        write_json(get_output_dir(trainer.args) / TEMPLATE_FILE, record)
