"""One training run of the command line, from its config to its report.

    sft-pipeline train configs/quickstart.yaml

The loss is three hops away: training/trainer.py (`SupervisedTrainer`, whose inherited `compute_loss` calls the model),
model/loss_forward.py (`patch_loss_forward`: the model's forward pass returns the loss), model/linear_cross_entropy.py
(`linear_cross_entropy`: the loss and its gradient, without a matrix of all logits).
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from rich.console import Console
from transformers.trainer_utils import TrainOutput

from sft_pipeline.config import SFTConfig, get_output_dir
from sft_pipeline.data.preview import print_row
from sft_pipeline.reports.console_summary import print_results
from sft_pipeline.reports.html import write_report
from sft_pipeline.runs.output_dir import RESULTS_FILE, check_output_dir
from sft_pipeline.training.memory import measure_peak_memory_gib
from sft_pipeline.training.rank_failures import report_lost_ranks
from sft_pipeline.training.sft_trainer import SFTTrainer, count_rows
from sft_pipeline.utils.console import print_line
from sft_pipeline.utils.files import write_json
from sft_pipeline.utils.progress import show_elapsed_time

PACKAGES = ("sft_pipeline", "torch", "transformers", "datasets", "accelerate", "tokenizers")


@report_lost_ranks()
def train(args: SFTConfig, console: Console) -> dict[str, Any]:
    """Fine-tune a model as the config says, save it and write the report; return what is written to results.json.

    The output folder gets the model, its tokenizer and all files that runs/output_dir.py lists.
    """
    check_output_dir(args)  # before rows and model are loaded, which may take minutes
    trainer = SFTTrainer(args=args)
    if trainer.is_world_process_zero():
        print_row(trainer.data.train[0], trainer.template.tokenizer, "first training row", console)
    output = trainer.train()
    with show_elapsed_time(f"saving {args.output_dir}", bool(args.disable_tqdm)):
        trainer.save_model()
        trainer.save_state()
    results = build_results(trainer, output)
    if trainer.is_world_process_zero():
        folder = get_output_dir(args)
        write_json(folder / RESULTS_FILE, results)
        print_results(results, str(folder), console)
        print_line(console, f"report: {write_report([folder])}")
    return results


def build_results(trainer: SFTTrainer, output: TrainOutput) -> dict[str, Any]:
    """Build the content of results.json from a trainer that has trained."""
    history = trainer.state.log_history
    eval_losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return {
        "eval_loss": {"before": next(iter(eval_losses), None), "after": next(reversed(eval_losses), None)},
        "train_loss": output.training_loss,
        "trainable_parameters": trainer.trainable_parameters,
        "steps": trainer.state.global_step,
        "tokens_per_second": output.metrics["tokens_per_second"],
        "peak_memory_gib": measure_peak_memory_gib(),
        "seconds": round(output.metrics["train_runtime"], 1),
        **trainer.evaluation.compare_with_start(),
        "rows": count_rows(trainer.data),
        "unread": trainer.data.unread,
        "loss_curve": [entry for entry in history if "loss" in entry or "eval_loss" in entry],
        "versions": {name: version(name) for name in PACKAGES},
        "seed": trainer.args.seed,
        "config": trainer.config_record,
    }
