"""One training run from its config to its results, read top to bottom.

    sft-pipeline train configs/quickstart.yaml

`train` runs the steps in order; the functions below it are steps that need more than a line.

The loss is three hops away: training/trainer.py (`SupervisedTrainer`, whose inherited `compute_loss` calls the model),
model/loss_forward.py (`patch_loss_forward`: the model's forward pass returns the loss), model/linear_cross_entropy.py
(`linear_cross_entropy`: the loss and its gradient, without a matrix of all logits).
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

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
from sft_pipeline.runs.checkpoints import needs_evaluation
from sft_pipeline.runs.output_dir import (
    PREVIEW_FILE,
    RESULTS_FILE,
    check_output_dir,
    copy_evaluations,
    create_output_dir,
)
from sft_pipeline.runs.trained_model import save_template_settings
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
    """Fine-tune a model as the arguments say; return what is written to results.json.

    The output folder gets the model, its tokenizer and all files that runs/output_dir.py lists.
    """
    # Arguments and output folder.
    checkpoint = check_output_dir(sft, training)
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
    config = build_config_record(sft, training)  # before the steps below change `training`
    drop_missing_trackers(training)

    # Tokenizer, rows, model.
    path = resolve_model(sft.model_name_or_path, get_cache_dir())
    tokenizer = load_tokenizer(path, sft.trust_remote_code)
    template = build_template(sft.template, tokenizer)
    data = load_training_data(sft, template, training)
    set_seed(training.seed)
    model = load_model(path, sft.trust_remote_code)
    set_special_tokens(model, tokenizer, template.stop_token_id)

    # Only now is an earlier run replaced: all input has been read without an error.
    create_output_dir(sft, training)
    copy_evaluations(checkpoint, training)
    if training.process_index == 0:
        show_first_row(data, tokenizer, training, console)

    # Trainer.
    if checkpoint:
        training.eval_on_start = needs_evaluation(checkpoint, training)
    trainer = build_trainer(sft, training, model, template, data)
    evaluation = EvaluationCallback(trainer, template, data.held_out_messages, sft)
    trainer.add_callback(evaluation)
    trainable_parameters = count_trainable_parameters(trainer.model)  # before `save_run` may merge adapters

    # Training, and the evaluation of the final model.
    with start_trackers(trainer, checkpoint, describe_data_for_trackers(sft, data)):
        output = trainer.train(resume_from_checkpoint=checkpoint)
        tokens_per_second = trainer.tokens_per_second()
        final_metrics = evaluate_final_model(trainer, evaluation) if data.held_out else {}

    # Model, results, report.
    with show_elapsed_time(f"saving {training.output_dir}", bool(training.disable_tqdm)):
        save_run(trainer, template, sft)
    results = {
        "eval_loss": {"before": get_first_eval_loss(trainer), "after": final_metrics.get("eval_loss")},
        "train_loss": output.training_loss,
        "trainable_parameters": trainable_parameters,
        "steps": trainer.state.global_step,
        "tokens_per_second": round(tokens_per_second, 1),
        "peak_memory_gib": measure_peak_memory_gib(),
        "seconds": round(output.metrics["train_runtime"], 1),
        **compare_with_start(evaluation),
        "rows": collect_row_counts(data),
        "loss_curve": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
        "versions": {name: version(name) for name in PACKAGES},
        "seed": training.seed,
        "config": config,
    }
    if trainer.is_world_process_zero():
        folder = get_output_dir(training)
        write_json(folder / RESULTS_FILE, results)
        print_results(results, str(folder), console)
        print_line(console, f"report: {write_report([folder])}")
    return results


def load_training_data(sft: SFTArguments, template: Template, training: TrainingArguments) -> PreparedData:
    """Map the shards of `prepared_data`, or encode the rows of the config.

    On each machine the first process encodes; the others then read its cache.
    """
    if sft.prepared_data:
        return map_shards(sft, template, training)
    with training.main_process_first(desc="encoding"):
        return prepare_data(sft, template)


def show_first_row(
    data: PreparedData, tokenizer: PreTrainedTokenizerBase, training: TrainingArguments, console: Console
) -> None:
    """Print the first training row as it is trained, and write PREVIEW_FILE for the report."""
    print_row(data.train[0], tokenizer, "first training row", console)
    write_json(get_output_dir(training) / PREVIEW_FILE, build_preview(data.train, tokenizer))


def collect_row_counts(data: PreparedData) -> dict[str, dict[str, Any] | None]:
    """Return the counts of training and held-out rows: kept, dropped, tokens (data/encode.py, EncodingStats)."""
    return {"train": asdict(data.train_stats), "held_out": asdict(data.held_out_stats) if data.held_out_stats else None}


def describe_data_for_trackers(sft: SFTArguments, data: PreparedData) -> dict[str, Any]:
    """Return what trackers store beside TrainingArguments: our arguments, row counts, shares of supervised tokens."""
    stats = {"train": data.train_stats, "held_out": data.held_out_stats}
    shares = {name: split.supervised_tokens / split.tokens for name, split in stats.items() if split}
    return {"sft": asdict(sft), "data": collect_row_counts(data), "supervised_share": shares}


def get_first_eval_loss(trainer: SupervisedTrainer) -> float | None:
    """Return the held-out loss at step 0; None without held-out rows."""
    return next((entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry), None)


def evaluate_final_model(trainer: SupervisedTrainer, evaluation: EvaluationCallback) -> dict[str, float]:
    """Return the held-out metrics of the model that will be saved.

    If the last evaluation was made at the last step with all prompts, it is returned instead of a new one, unless
    `load_best_model_at_end` has replaced the model since.
    """
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    step = trainer.state.global_step
    if last.get("step") == step and evaluation.is_complete(step) and not trainer.args.load_best_model_at_end:
        return last
    return trainer.evaluate()


def compare_with_start(evaluation: EvaluationCallback) -> dict[str, Any]:
    """Return the metrics of the last evaluation, their changes since step 0, and the answers of both."""
    first, last = evaluation.before, evaluation.evaluations[-1] if evaluation.evaluations else None
    return {
        "metrics": last and last.metrics,
        "before_and_after": compute_changes(first, last) if first and last else {},
        "answers": join_answers(first, last) if last else [],
    }


def save_run(trainer: SupervisedTrainer, template: Template, sft: SFTArguments) -> None:
    """Save model (or adapters), tokenizer with the trained chat template, trainer state and template settings."""
    trainer.processing_class = build_saved_tokenizer(template, sft.system_prompt)
    if sft.lora and sft.lora_merge:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_template_settings(get_output_dir(trainer.args), sft.template, sft.system_prompt)
