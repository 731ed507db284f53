"""The model card of an exported run: what it was trained on, how, what changed in metrics, under which licence.

The front matter is what the hub reads: base model, licence, data sets, and the metrics as its `model-index`.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, try_to_load_from_cache

from sft_pipeline.data.sources import is_hub_name
from sft_pipeline.model.loading import PACKAGED
from sft_pipeline.reports.console_summary import FIGURES
from sft_pipeline.reports.run_results import RunResults

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
# Our metrics in the model-index, under the names of its metrics where it has one.
METRICS = {
    "nll_nats_per_token": ("loss", "held-out loss, nats a token"),
    "perplexity": ("perplexity", "held-out perplexity"),
    "token_accuracy": ("accuracy", "held-out token accuracy"),
    "stop_rate": ("stop_rate", "answers that end by themselves"),
    "loop_rate": ("loop_rate", "answers in a loop"),
    "instructions_followed_rate": ("instructions_followed_rate", "checkable instructions followed"),
}
SETTINGS = (
    "template", "system_prompt", "train_on", "max_length", "overlong", "packing", "tokens_per_batch",
    "lora", "lora_rank", "lora_alpha", "lora_target_modules", "trainable_modules", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "optim", "bf16", "fp16", "seed",
)  # fmt: skip


def build_model_card(run: RunResults, name: str, dtype: str, licence: str | None) -> ModelCard:
    """The card of the model called `name`. licence: as the hub names it; None takes the base's."""
    config = run.results["config"]
    base, data = config["model_name_or_path"], [*config["train_data"], *config.get("eval_data", [])]
    metadata = ModelCardData(
        model_name=name,
        base_model=_hub_model(base),
        license=licence or find_licence(base, "model"),
        datasets=[one for one in data if _on_the_hub(one)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sft", "sft_pipeline"],
        eval_results=_eval_results(run, data) or None,
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        dtype=dtype,
        base=_hub_model(base) or _shown(base),
        base_licence=find_licence(base, "model"),
        data=[(_shown(one), find_licence(one, "dataset")) for one in data],
        results=run.results,
        titles=FIGURES,
        settings={key: config[key] for key in SETTINGS if config.get(key) and (config["lora"] or "lora" not in key)},
    )


def find_licence(name: str, kind: str) -> str | None:
    """What the card beside a model or data set says (README.md with front matter), on disk or in the hub's cache.

    kind: "model" or "dataset". Nothing is fetched.
    """
    if name in PACKAGED:
        return PACKAGED[name].licence
    path = Path(name).expanduser()
    card = (path if path.is_dir() else path.parent) / "README.md" if path.exists() else None
    if card is None and _on_the_hub(name):
        found = try_to_load_from_cache(name, "README.md", repo_type=kind)
        card = Path(found) if isinstance(found, str) else None
    metadata = metadata_load(card) if card and card.is_file() else None
    licence = (metadata or {}).get("license")
    return licence if isinstance(licence, str) else None


def _eval_results(run: RunResults, data: list[str]) -> list[EvalResult]:
    """The metrics of the saved model, as far as the run has them."""
    metrics = run.results["metrics"] or {}
    held_out = f"held-out rows of {', '.join(map(_shown, data))}"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="instructions" if name.startswith("instructions") else "held-out",
            dataset_name="sft_pipeline's checkable instructions" if name.startswith("instructions") else held_out,
            metric_type=metric,
            metric_name=title,
            metric_value=round(metrics[name], 4),
        )
        for name, (metric, title) in METRICS.items()
        if metrics.get(name) is not None
    ]


def _hub_model(name: str) -> str | None:
    if name in PACKAGED:
        return PACKAGED[name].hub_name
    return name if _on_the_hub(name) else None


def _on_the_hub(name: str) -> bool:
    """Whether it is the name of a model or data set there, and no path."""
    return not Path(name).expanduser().exists() and is_hub_name(name)


def _shown(name: str) -> str:
    """Without the folders of this machine."""
    return Path(name).name if Path(name).expanduser().is_absolute() else name
