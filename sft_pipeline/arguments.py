"""The keys of this package, without imports of torch or transformers: `--help` lists them at once."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sft_pipeline.utils.errors import SFTError

DEFAULT_PROJECT = "sft_pipeline"  # the project name in trackers; the library's default is huggingface
SET_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class SourceEntry:
    """An entry of `train_data` or `eval_data`, in the words of `datasets.load_dataset`.

    path: a file, a folder or the name of a hub dataset; split: of a hub dataset or a saved DatasetDict, by default
    train. name (the configuration), revision and data_files are those of a hub dataset. weight: as in
    `train_data_weights`.
    """

    path: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    data_files: str | list[str] | None = None
    weight: float | None = None

    @classmethod
    def parse(cls, entry: str | dict[str, Any], key: str = "source") -> SourceEntry:
        """Parse a path, or an object of the fields above, which may be JSON text. Raises SFTError with `key`."""
        if isinstance(entry, str) and not entry.lstrip().startswith("{"):
            return cls(entry)
        try:
            values = parse_json(entry) if isinstance(entry, str) else dict(entry)
        except ValueError as error:
            raise SFTError(f"{key}: {entry!r} is not JSON ({error}); write {{path: ..., split: ...}}") from error
        names = [member.name for member in fields(cls)]
        for name, value in values.items():
            if name not in names:
                raise SFTError(f"{key}: an entry has the unknown key {name}; it may have {', '.join(names)}")
            kind, noun = (float, "number") if name == "weight" else (str, "text")
            members = value if name == "data_files" and isinstance(value, list) else [value]
            if not members or not all(_is_of_kind(member, kind) for member in members):
                raise SFTError(f"{key}: {name} of an entry is {value!r}; give a {noun}")
        if "path" not in values:
            raise SFTError(f"{key}: the entry {json.dumps(values, ensure_ascii=False)} has no path; add it")
        return cls(**values)

    def format(self) -> str | dict[str, Any]:
        """Return what `parse` reads: the path alone, or an object."""
        values = {member.name: getattr(self, member.name) for member in fields(self)}
        values = {name: value for name, value in values.items() if value is not None}
        return self.path if len(values) == 1 else values

    @property
    def label(self) -> str:
        """The name of the source in logs and errors."""
        names = ("name", "split", "revision", "data_files")
        options = [f"{name}: {getattr(self, name)}" for name in names if getattr(self, name) is not None]
        return f"{self.path} ({', '.join(options)})" if options else self.path


def parse_eval_data(value: Any) -> dict[str | None, list[SourceEntry]]:
    """Parse `eval_data` into the entries of each held-out set.

    value: a list of entries, which are one set without a name (None); or a mapping of names to an entry or a list of
    entries, also as the only text of a list, in JSON. An object with a key of an entry is an entry. Raises SFTError.
    """
    entries = [value] if isinstance(value, (str, dict)) else list(value)
    mappings = [mapping for mapping in map(_parse_named_sources, entries) if mapping]
    if not mappings:
        return {None: [SourceEntry.parse(entry, "eval_data") for entry in entries]} if entries else {}
    if len(entries) > 1:
        raise SFTError("eval_data: a mapping of names to sources stands alone; write every source in it, with a name")
    sets: dict[str | None, list[SourceEntry]] = {}
    for name, sources in mappings[0].items():
        check_set_name(name, "eval_data")
        sources = sources if isinstance(sources, list) else [sources]
        if not sources or not all(isinstance(source, (str, dict)) and source for source in sources):
            raise SFTError(f"eval_data: the set {name} has no source; give a path, or {{path: ..., split: ...}}")
        sets[name] = [SourceEntry.parse(source, f"eval_data {name}") for source in sources]
    return sets


def check_set_name(name: Any, key: str) -> None:
    """Raise SFTError if a held-out set cannot have this name, which becomes a part of the names of its metrics."""
    if not isinstance(name, str) or not SET_NAME.fullmatch(name):
        raise SFTError(f"{key}: {name!r} cannot be the name of a held-out set; use letters, digits, _ and -")


def _parse_named_sources(entry: Any) -> dict[str, Any] | None:
    """Return the mapping of names to sources that an item of eval_data is; None for an entry."""
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        try:
            entry = parse_json(entry)
        except json.JSONDecodeError:
            return None  # SourceEntry.parse says why
    if not isinstance(entry, dict) or any(member.name in entry for member in fields(SourceEntry)):
        return None
    return entry


def parse_json(text: str) -> Any:
    """Parse JSON in which no object names a key twice. Raises ValueError, and SFTError for such a key."""

    def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check_given_once([name for name, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=build_object)


def check_given_once(names: Sequence[Any]) -> None:
    """Raise SFTError for a key that a mapping of YAML or JSON names twice."""
    for name in names:
        if names.count(name) > 1:
            raise SFTError(f"{name} is given twice; all but the last would be lost")


def _is_of_kind(value: Any, kind: type) -> bool:
    """Return whether a value is a number (`float`) or a text that is not empty (`str`)."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, str) and bool(value)


@dataclass
class SFTArguments:
    """The keys of this package, which `SFTConfig` (config.py) adds to those of `transformers.TrainingArguments`."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model to train: a hub name, a model folder, or smollm2-135m (from the package index)."},
    )
    train_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Training data: files, folders or hub names of datasets with instruction rows, each a name or "
            "{path, name, split, revision, data_files, weight}."
        },
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Held-out data, given like train_data, or {name: data} for sets with metrics of their own; without "
            "it, `held_out` splits rows off train_data."
        },
    )
    train_data_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Times that each source of train_data is used per epoch: 2 is twice, 0.5 uses half of its rows. "
            "With streaming, the proportions of their rows."
        },
    )
    held_out: float = field(
        default=0.0,
        metadata={
            "help": "Rows of train_data held out for evaluation: a number from 1, a fraction below 1, or 0 for none."
        },
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Skip and count malformed rows instead of stopping at the first one."}
    )
    template: Literal["role", "chat"] = field(
        default="chat",
        metadata={
            "help": "Format: chat is the tokenizer's chat template, role is \\n#SYSTEM: \\n#USER: \\n#ASSISTANT:."
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "With template: chat, a jinja file or the name of one of the tokenizer's templates, in place "
            "of its default."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of the chat template for all rows, such as {enable_thinking: false}."},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message for rows that have none of their own."}
    )
    train_on: Literal["all", "last"] = field(
        default="all",
        metadata={"help": "Assistant turns that the loss is computed on: all turns of a conversation, or the last."},
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "Maximum number of tokens in a sequence; longer ones are handled by `overlong`."},
    )
    overlong: Literal["drop", "truncate_answer", "truncate_turns"] = field(
        default="drop",
        metadata={
            "help": "How to handle sequences above max_length: drop them, cut their end or remove their oldest turns."
        },
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Concatenate the rows of a batch without padding."},
    )
    share_prefixes: bool = field(
        default=True,
        metadata={"help": "With packing, compute the prefixes that sequences of a batch share once."},
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "With packing, run the rows of a step in micro-batches of at most this many tokens; 0 for "
            "per_device_train_batch_size rows. Default: 16384 on CUDA, else 0."
        },
    )
    pad_to_multiple_of: int = field(
        default=8, metadata={"help": "Without packing, batches are padded to a multiple of this many tokens."}
    )
    lora: bool = field(
        default=False, metadata={"help": "Train low-rank adapters (LoRA, with peft) instead of all parameters."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA adapters."})
    lora_alpha: int = field(
        default=32, metadata={"help": "LoRA scaling: adapter outputs are multiplied by lora_alpha / lora_rank."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the linear layers that get LoRA adapters; all-linear selects all of them."},
    )
    lora_merge: bool = field(
        default=False, metadata={"help": "Save the model with the adapters merged into it, instead of the adapters."}
    )
    trainable_modules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Train only parameters whose name matches one of these regular expressions, such as self_attn."
        },
    )
    max_train_rows: int = field(
        default=0,
        metadata={"help": "Maximum number of training rows, selected by a hash of their content; 0 uses all rows."},
    )
    prepared_data: str | None = field(
        default=None,
        metadata={"help": "Folder written by `prepare`; training reads its encoded rows instead of encoding them."},
    )
    num_proc: int = field(default=2, metadata={"help": "Number of processes that encode rows."})
    num_answers: int = field(
        default=5,
        metadata={"help": "Held-out prompts answered before and after training; eval_answer_share limits the others."},
    )
    num_instructions: int = field(
        default=24,
        metadata={
            "help": "Built-in instructions (of 74) answered with these prompts; code checks that they are followed."
        },
    )
    eval_answer_share: float = field(
        default=0.1,
        metadata={
            "help": "Maximum time for answers during training, as a fraction of training time; limits their number."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Maximum number of tokens in an answer."})
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "Stop after this many evaluations without a better eval_loss; 0 disables early stopping."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that is already in output_dir."}
    )
    push_evaluation: bool = field(
        default=False,
        metadata={
            "help": "With push_to_hub, also upload evaluations, report, preview and logs: text of rows and answers."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that a model repository contains."}
    )
    revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the hub repository of model_name_or_path; by default its main."},
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={
            "help": "Type of the weights, their gradients and AdamW's moments; in bfloat16 small updates are lost."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention as in transformers: sdpa, eager, flash_attention_2, ... Batches are then padded; "
            "by default they are packed, with an attention of this package."
        },
    )
    peft: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Adapters: the fields of peft's LoraConfig, such as {use_dora: true}, or of the config of another "
            "peft_type."
        },
    )
    add_tokens: list[str] = field(
        default_factory=list,
        metadata={"help": "Tokens to add to the tokenizer and the model; their embeddings are trained, also by LoRA."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Train adapters on a base with weights in 4 bits (nf4, QLoRA, with bitsandbytes)."},
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Train adapters on a base with weights in 8 bits, with bitsandbytes."}
    )
    eval_tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Tasks of lm-evaluation-harness asked at the end: names such as gsm8k, YAML files, or folders."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Encode the rows of train_data as they come, for data larger than the disk; needs max_steps."
        },
    )

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, by the keys."""
        return self.lora or bool(self.peft)

    @property
    def quantization_key(self) -> str | None:
        """The key that quantizes the base, or None."""
        return "load_in_4bit" if self.load_in_4bit else "load_in_8bit" if self.load_in_8bit else None
