"""The model card of a run that is exported or pushed: base model and data with revisions and licences, changes of
metrics with their intervals, the config and command that repeat the run.

The front matter is for the Hub: base model, licence, data sets, languages, and the metrics as its `model-index`.
"""

from __future__ import annotations

import itertools
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, try_to_load_from_cache

from sft_pipeline.arguments import SFTArguments, SourceEntry, parse_eval_data
from sft_pipeline.data.sources import is_hub_name
from sft_pipeline.evaluation.metrics.registry import INSTRUCTIONS_FOLLOWED, METRICS, TOOL_CALLS_MATCHED
from sft_pipeline.model.loading import PACKAGED
from sft_pipeline.reports.console_summary import format_changes, format_score

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
# The metrics of the model-index.
CARD_METRICS = (
    "nll_nats_per_token", "perplexity", "token_accuracy", "stop_rate", "loop_rate", TOOL_CALLS_MATCHED,
    INSTRUCTIONS_FOLLOWED,
)  # fmt: skip
SETTINGS = (
    "template", "system_prompt", "train_on", "max_length", "overlong", "packing", "tokens_per_batch",
    "lora", "lora_rank", "lora_alpha", "lora_target_modules", "peft", "trainable_modules", "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "optim", "bf16", "fp16", "seed",
)  # fmt: skip


def build_model_card(
    results: dict[str, Any], name: str, dtype: str, licence: str | None, has_adapters: bool = False
) -> ModelCard:
    """Build the card of the model `name`. results: the content of a run's results.json.

    licence: an identifier of the Hub; None takes that of the base model. has_adapters: the model is saved as adapters.
    """
    config = results["config"]
    held_out = parse_eval_data(config.get("eval_data", []))
    train_entries = [SourceEntry.parse(entry) for entry in config.get("train_data", [])]
    entries = [*train_entries, *itertools.chain(*held_out.values())]
    counts = [results.get("sources", {}).get(entry.label) for entry in train_entries]
    base, data = config["model_name_or_path"], [entry.path for entry in entries]
    languages = [language for source in data for language in find_languages(source)]
    metadata = ModelCardData(
        model_name=name,
        base_model=_get_hub_model(base),
        license=licence or find_licence(base, "model"),
        language=list(dict.fromkeys(languages)) or None,
        datasets=list(dict.fromkeys(filter(_is_on_hub, data))) or None,
        library_name="peft" if has_adapters else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", "sft_pipeline"],
        eval_results=_build_eval_results(results, data) or None,
    )
    peft = config.get("peft")
    has_lora_keys = config["lora"] or (peft and peft.get("peft_type", "LORA") == "LORA")
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        dtype=dtype,
        base=_get_hub_model(base) or _hide_folders(base) or "a model without a name",
        base_licence=find_licence(base, "model"),
        base_revision=config.get("revision"),
        data=[
            (_describe_source(entry), find_licence(entry.path, "dataset"), rows)
            for entry, rows in itertools.zip_longest(entries, counts)
        ],
        results=results,
        has_adapters=has_adapters,
        settings={key: config[key] for key in SETTINGS if config.get(key) and (has_lora_keys or "lora" not in key)},
        tasks={name: format_score(score) for name, score in results["tasks"].items()},
        run_config=_format_config(config),
        changes=format_changes(results),
    )


def find_licence(name: str, kind: str) -> str | None:
    """Return the licence in the card of a model or data set (README.md with front matter), on disk or in the Hub's
    cache. Nothing is downloaded.

    kind: "model" or "dataset".
    """
    if name in PACKAGED:
        return PACKAGED[name].licence
    licence = _read_card(name, kind).get("license")
    return licence if isinstance(licence, str) else None


def find_languages(name: str) -> list[str]:
    """Return the languages in the card of a data set, as `find_licence` finds it."""
    languages = _read_card(name, "dataset").get("language") or []
    languages = [languages] if isinstance(languages, str) else languages
    return [language for language in languages if isinstance(language, str)]


def _read_card(name: str, kind: str) -> dict[str, Any]:
    """Return the front matter of a model's or data set's card; nothing where there is none."""
    if not name:
        return {}  # a model or rows from a program, without a name
    path = Path(name).expanduser()
    card = (path if path.is_dir() else path.parent) / "README.md" if path.exists() else None
    if card is None and _is_on_hub(name):
        cached = try_to_load_from_cache(name, "README.md", repo_type=kind)
        card = Path(cached) if isinstance(cached, str) else None
    return (metadata_load(card) if card and card.is_file() else None) or {}


def _describe_source(entry: SourceEntry) -> str:
    """Return the name of a source, with its split and revision; one of the Hub without a revision may have changed."""
    label = replace(entry, path=_hide_folders(entry.path)).label
    return f"{label}, revision not pinned" if _is_on_hub(entry.path) and entry.revision is None else label


def _format_config(config: dict[str, Any]) -> str:
    """Return the config of a run as YAML, without folders of this machine and keys that have their default."""
    defaults = {
        key.name: key.default if key.default_factory is MISSING else key.default_factory()
        for key in fields(SFTArguments)
    }
    shown = {}
    for key, value in config.items():
        if key in defaults and value == defaults[key]:
            continue
        if key in ("train_data", "eval_data"):
            entries = [SourceEntry.parse(entry) for entry in value]
            value = [replace(entry, path=_hide_folders(entry.path)).format() for entry in entries]
        elif isinstance(value, str) and key not in ("system_prompt", "chat_template"):
            value = _hide_folders(value)
        if key not in ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint"):
            shown[key] = value
    return yaml.safe_dump(shown, allow_unicode=True, sort_keys=False).strip()


def _build_eval_results(results: dict[str, Any], data: list[str]) -> list[EvalResult]:
    """Return the metrics of the saved model that the run has: of all held-out rows, then of each held-out set."""
    parts: list[tuple[str | None, dict[str, Any], list[str]]] = [(None, results["metrics"] or {}, data)]
    for set_name, entries in parse_eval_data(results["config"].get("eval_data", [])).items():
        if set_name in results.get("sets", {}):
            parts.append((set_name, results["sets"][set_name]["metrics"], [entry.path for entry in entries]))
    eval_results = []
    for set_name, values, sources in parts:
        held_out = f"held-out rows of {', '.join(map(_hide_folders, sources))}" if sources else "held-out rows"
        for name in CARD_METRICS:
            if values.get(name) is None:
                continue
            is_instructions = name == INSTRUCTIONS_FOLLOWED
            eval_results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type="instructions" if is_instructions else "held-out",
                    dataset_name="sft_pipeline's checkable instructions" if is_instructions else held_out,
                    dataset_config=set_name,
                    metric_type=METRICS[name].hub_type or name,
                    metric_name=METRICS[name].label,
                    metric_value=round(values[name], 4),
                )
            )
    for score in results["tasks"].values():
        eval_results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=score["task"],
                dataset_name=score["task"],
                metric_type=score["metric"],
                metric_name=f"{score['metric']} ({score['filter']})",
                metric_value=round(score["value"], 4),
            )
        )
    return eval_results


def _get_hub_model(name: str) -> str | None:
    if name in PACKAGED:
        return PACKAGED[name].hub_name
    return name if _is_on_hub(name) else None


def _is_on_hub(name: str) -> bool:
    """Return whether this is the name of a model or data set on the Hub and not a path."""
    return not Path(name).expanduser().exists() and is_hub_name(name)


def _hide_folders(name: str) -> str:
    """Return the name without the folders of this machine."""
    return Path(name).name if Path(name).expanduser().is_absolute() else name
