"""The results of a run that has trained: the content of results.json, from which reports and model cards are made."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sft_pipeline.data.pipeline import PreparedData
from sft_pipeline.training.memory import measure_peak_memory_gib
from sft_pipeline.utils.errors import SFTError

if TYPE_CHECKING:
    from sft_pipeline.training.sft_trainer import SFTTrainer

PACKAGES = ("sft_pipeline", "torch", "transformers", "datasets", "accelerate", "tokenizers")


def build_results(trainer: SFTTrainer) -> dict[str, Any]:
    """Build the content of results.json from a trainer. Raises SFTError if it has not trained."""
    output = trainer.train_output
    if output is None:
        raise SFTError("results: nothing has been trained; call train() first")
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
        "seconds_by_part": trainer.times.as_dict(),
        **trainer.evaluation.compare_with_start(),
        "tasks": trainer.task_scores,
        "rows": count_rows(trainer.data),
        "sources": trainer.data.sources,
        "unread": trainer.data.unread,
        "loss_curve": [entry for entry in history if "loss" in entry or "eval_loss" in entry],
        "versions": {name: version(name) for name in PACKAGES},
        "seed": trainer.args.seed,
        "config": trainer.config_record,
    }


def count_rows(data: PreparedData) -> dict[str, dict[str, Any] | None]:
    """Return the counts of training and held-out rows: kept, dropped, tokens (data/encode.py, EncodingStats).

    Those of a held-out set stand under "held_out NAME".
    """
    sets = {f"held_out {name}": asdict(stats) for name, stats in data.held_out_sets.items()}
    held_out = asdict(data.held_out_stats) if data.held_out_stats else None
    return {"train": asdict(data.train_stats), "held_out": held_out, **sets}
