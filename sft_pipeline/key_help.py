"""The keys of a config as `train --help` lists them: in groups, with type, default and meaning.

Importing this module imports torch and transformers.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from sft_pipeline.config import SFTConfig

WIDTH = 80  # columns
# The keys that people set; `train --help all` lists the others in a last group.
GROUPS = {
    "model and data": (
        *("model_name_or_path", "train_data", "train_data_weights", "eval_data", "held_out", "max_train_rows"),
        *("prepared_data", "num_proc", "streaming", "lora", "lora_rank", "lora_alpha", "lora_target_modules"),
        *("lora_merge", "peft", "add_tokens", "load_in_4bit", "load_in_8bit"),
        *("trainable_modules", "trust_remote_code", "revision", "dtype", "attn_implementation"),
    ),
    "template and rows": (
        *("template", "chat_template", "chat_template_kwargs", "system_prompt", "train_on", "max_length", "overlong"),
        "skip_bad_rows",
    ),
    "optimisation": (
        *("learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
        *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
        *("neftune_noise_alpha", "seed", "data_seed", "train_sampling_strategy"),
    ),
    "batches and memory": (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "packing", "share_prefixes"),
        *(
            "tokens_per_batch",
            "pad_to_multiple_of",
            "activation_checkpointing",
            "auto_find_batch_size",
            "bf16",
            "fp16",
            "tf32",
        ),
        "dataloader_num_workers",
    ),
    "evaluation": (
        *("eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size", "num_answers"),
        *("num_instructions", "eval_answer_share", "max_new_tokens", "load_best_model_at_end"),
        *("metric_for_best_model", "early_stopping_patience", "eval_tasks"),
    ),
    "saving and resuming": (
        *("output_dir", "overwrite_output_dir", "save_strategy", "save_steps", "save_total_limit", "save_only_model"),
        *("resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"),
        "push_evaluation",
    ),
    "devices": ("use_cpu", "fsdp", "fsdp_config", "deepspeed", "ddp_backend", "ddp_timeout"),
    "logging and tracking": (
        *("report_to", "run_name", "project", "logging_steps", "logging_first_step", "log_level", "disable_tqdm"),
    ),
}


def describe_keys(all_keys: bool) -> str:
    """List the keys that people set, or all of them with the library's whole texts, at most WIDTH columns wide."""
    fields = {field.name: field for field in dataclasses.fields(SFTConfig) if field.init}
    groups = {title: [name for name in names if name in fields] for title, names in GROUPS.items()}
    if all_keys:
        listed = {name for names in groups.values() for name in names}
        groups["other keys of transformers.TrainingArguments"] = [name for name in fields if name not in listed]
    hints = typing.get_type_hints(SFTConfig)
    blocks = [
        "\n".join(
            [f"{title}:", *(line for name in names for line in _describe_key(fields[name], hints[name], all_keys))]
        )
        for title, names in groups.items()
    ]
    if not all_keys:
        blocks.append("`sft-pipeline train --help all` lists all keys.")
    return "\n\n".join(blocks)


def _describe_key(key: dataclasses.Field[Any], hint: Any, whole: bool) -> Iterator[str]:
    """Yield the lines of a key: name, type and default, then its text, or only the first sentence of the text."""
    default = key.default if key.default_factory is dataclasses.MISSING else key.default_factory()
    first = f"{key.name}: {', '.join(dict.fromkeys(_list_type_names(hint)))} (default: {_format_default(default)})"
    yield from textwrap.wrap(first, WIDTH, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False)
    text = " ".join(key.metadata.get("help", "").replace("%%", "%").split())
    if not whole:
        text = re.split(r"(?<=[.!?]) (?=[A-Z`])", text)[0]
    yield from textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)


def _list_type_names(hint: Any) -> Iterator[str]:
    """Yield what a value of the type is called in a YAML file: `float`, `list`, or each word of a closed set."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        yield from (str(member).lower() for member in members)
    elif origin is list:
        yield f"list of {next(_list_type_names(members[0]))}"
    elif origin is dict:
        yield "dict"
    elif members:
        for member in members:
            if member is not type(None):
                yield from _list_type_names(member)
    else:
        yield "str" if issubclass(hint, (str, Enum)) else hint.__name__


def _format_default(default: Any) -> str:
    """Format a default as YAML writes it; None and an empty list or text are `none`."""
    if default is None or default in ("", []):
        return "none"
    if isinstance(default, list):
        return ", ".join(map(str, default))
    if isinstance(default, bool | Enum):
        return str(default.value if isinstance(default, Enum) else default).lower()
    return str(default)
