"""Check the names of held-out sets and the metric that chooses the best model, before rows and model are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft_pipeline.arguments import parse_eval_data
from sft_pipeline.config import SFTConfig, check_best_metric
from sft_pipeline.evaluation.metrics.registry import METRICS
from sft_pipeline.utils.errors import SFTError

# Logged as eval_NAME beside the metrics of the registry, by the library and by EvaluationCallback.
OTHER_NAMES = (
    *("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time"),
    *("answers", "instructions", "answer_errors", "answer_seconds"),
)


def check_held_out_sets(args: SFTConfig, eval_dataset: Any = None) -> None:
    """Raise SFTError for a held-out set whose metrics would be taken for others, and for a `metric_for_best_model` that
    no set has.

    eval_dataset: of `SFTTrainer`, in place of `eval_data`.
    """
    key, sets = "eval_data", dict[Any, Any](parse_eval_data(args.eval_data))
    if eval_dataset is not None:
        key, sets = "eval_dataset", dict(eval_dataset) if isinstance(eval_dataset, Mapping) else {}
    names = [name for name in sets if name is not None]
    for name in names:
        if name in (*OTHER_NAMES, *METRICS):
            raise SFTError(f"{key}: a held-out set cannot have the name {name} of a metric; choose another name")
        # The library adds no second "eval_" to the name of a metric.
        if name == "eval" or name.startswith("eval_"):
            raise SFTError(f"{key}: the name {name} of a held-out set begins like a metric, with eval; choose another")
    check_best_metric(args, names)
