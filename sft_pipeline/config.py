"""Configuration of a run: `SFTConfig`, from a flat YAML file and command-line overrides, or from Python.

    sft-pipeline train configs/quickstart.yaml --learning_rate 2e-5
    SFTConfig("outputs/run", learning_rate=2e-5)

Importing this module imports torch and transformers.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import json
import keyword
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import HubStrategy, SchedulerType
from transformers.utils import is_torch_tf32_available

from sft_pipeline.arguments import (
    DEFAULT_PROJECT,
    SFTArguments,
    SourceEntry,
    check_given_once,
    parse_eval_data,
    parse_json,
)
from sft_pipeline.utils.errors import SFTError, format_error


def _set_default(name: str, default: Any) -> Any:
    """Return a field of TrainingArguments, with its help text and another default."""
    return field(default=default, metadata=TrainingArguments.__dataclass_fields__[name].metadata)


@dataclass
class SFTConfig(SFTArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the keys of this package, and defaults for short runs.

    The keys of a YAML config are the fields of this class. Raises SFTError for values out of range, for keys that
    exclude each other, and for one of several processes that did not join the others.
    """

    logging_steps: float = _set_default("logging_steps", 10)
    logging_first_step: bool = _set_default("logging_first_step", True)
    # Without held-out rows SFTTrainer turns both off.
    eval_strategy: str = _set_default("eval_strategy", "epoch")
    eval_on_start: bool = _set_default("eval_on_start", True)
    # Training shows its own progress bar; the library's default, "passive", would hide it under accelerate launch.
    disable_tqdm: bool | None = _set_default("disable_tqdm", False)
    # Each message is logged once, also on several nodes.
    log_on_each_node: bool = _set_default("log_on_each_node", False)
    # A NaN loss must appear in the log, not be left out of the average.
    logging_nan_inf_filter: bool = _set_default("logging_nan_inf_filter", False)
    # Early stopping counts the evaluations before a resume, too.
    restore_callback_states_from_checkpoint: bool = _set_default("restore_callback_states_from_checkpoint", True)
    project: str = _set_default("project", DEFAULT_PROJECT)
    # Without a value: 1 on CUDA, where collating then runs beside the steps, else 0.
    dataloader_num_workers: int | None = _set_default("dataloader_num_workers", None)  # type: ignore[assignment]
    # Without a value: true where a GPU computes in it, unless another precision is chosen.
    bf16: bool | None = _set_default("bf16", None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        _use_cpu_without_accelerator()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = int(_uses_cuda(self))
        refuses_bf16 = self.bf16 is False
        self.bf16 = _choose_bf16(self) if self.bf16 is None else self.bf16
        # Not for the library, which would set TF32 in a way that breaks compilation, and compile the whole model.
        tf32, self.tf32 = _choose_tf32(self), None
        compile_keys = {key: getattr(self, key) for key in COMPILE_KEYS}
        vars(self).update(dict.fromkeys(COMPILE_KEYS), torch_compile=False)
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("perplexity"):
            self.greater_is_better = False  # the library takes everything but a loss for better where it is greater
        super().__post_init__()
        vars(self).update(compile_keys, tf32=tf32, torch_compile=any(compile_keys.values()))
        if self.mixed_precision == "bf16" and refuses_bf16:
            self.mixed_precision = "no"  # the config overrides accelerate's file
        if self.mixed_precision in ("bf16", "fp16"):
            setattr(self, self.mixed_precision, True)  # maybe of accelerate's file
        if tf32 is not None and self.device.type == "cuda":
            # The library uses torch's newer setting: after it torch 2.13 cannot compile FlexAttention, as inductor
            # still reads the older one.
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
        self.chat_template_kwargs = _parse_template_kwargs(self.chat_template_kwargs)
        self.peft = _parse_mapping("peft", self.peft)
        self.train_data, self.eval_data = _parse_train_data(self), _parse_eval_data(self.eval_data)
        _check_values(self)
        _check_world_size(self)

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> SFTConfig:
        """Return `args` itself if it is a SFTConfig, else one with its values and our defaults for the other keys."""
        if isinstance(args, cls):
            return args
        values = {key.name: getattr(args, key.name) for key in dataclasses.fields(TrainingArguments) if key.init}
        values["bf16"] = args.mixed_precision == "bf16"  # also of accelerate's file
        return cls(**values)

    @property
    def n_gpu(self) -> int:
        """At most 1: one process per device. DataParallel, the library's way to use several GPUs in one process, would
        split a packed batch."""
        return min(1, super().n_gpu)


# Of torch.compile, which model/compiled_layers.py calls; a backend or a mode turn it on, as in the library.
COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
# Recorded even if they have the default value, which may differ in another version of this package.
RECORDED_KEYS = (
    *("output_dir", "learning_rate", "seed", "num_train_epochs", "per_device_train_batch_size", "tf32"),
    *(name for name in SFTConfig.__annotations__ if name in TrainingArguments.__dataclass_fields__),
)


class _Loader(yaml.SafeLoader):
    """Safe YAML loader with three rules of YAML 1.2 instead of 1.1: `1e-5` is a number, only `true` and `false` are
    booleans, so that `save_strategy: no` is a string, and a key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        check_given_once([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def parse_config(config: str | None, overrides: Sequence[str] = ()) -> SFTConfig:
    """Parse `config` (a YAML file, or None) and `overrides` (["--key", "value", ...]), which take precedence.

    Raises SFTError for a file that is missing or not flat YAML, an unknown or missing key, or an invalid value.
    """
    return parse_keys(read_keys(Path(config)) if config else {}, config or "run", overrides)


def parse_keys(keys: dict[str, Any], name: str = "run", overrides: Sequence[str] = ()) -> SFTConfig:
    """Parse the keys of a dictionary like `parse_config`; `name` is used in errors and in the default `output_dir`."""
    parser = _Parser()
    from_file = _convert_keys(keys, name, parser)
    try:
        args, unknown = parser.parse_args_into_dataclasses(
            args=[*from_file, *overrides], return_remaining_strings=True, look_for_args_file=False
        )
    except SFTError:
        raise
    except PackageNotFoundError as error:  # the library checks no other key's package
        raise SFTError("deepspeed needs a package that is not installed: pip install deepspeed") from error
    except Exception as error:
        # TrainingArguments validates its fields against each other and the machine, with exceptions of many types.
        raise SFTError(format_error(error, limit=400)) from error
    _check_known_keys([word for word in unknown if word.startswith("--")], "the command line")
    if unknown:
        raise SFTError(f"the command line: {unknown[0]} belongs to no key; a config file comes first")
    if missing := [key for key in ("model_name_or_path", "train_data") if not getattr(args, key)]:
        raise SFTError(f"missing: {', '.join(missing)}; add it to the config file or the command line")
    if args.hub_token:
        raise SFTError(
            "hub_token: configs and command lines are saved and can be read; set HF_TOKEN or call `hf auth login`"
        )
    if args.output_dir == "trainer_output":
        args.output_dir = str(Path("outputs") / Path(name).stem)
    return args


class _Parser(HfArgumentParser):
    """A parser of SFTConfig that raises SFTError instead of printing its usage."""

    def __init__(self) -> None:
        config_class: Any = SFTConfig
        super().__init__(config_class, allow_abbrev=False)

    def add_argument(self, *names: Any, **options: Any) -> Any:
        if names[0] == "--fsdp":
            # The library reads its value as a string, as older releases did; true and false must be booleans.
            options["type"] = lambda text: {"true": True, "false": None}.get(text.lower(), text)
        if names[0] == "--include_num_input_tokens_seen":
            # The library reads its value as a boolean, as older releases did.
            options["type"] = lambda text: {"true": "all", "false": "no"}.get(text.lower(), text)
            options["choices"] = ("all", "non_padding", "no")
        if typing.get_origin(options.get("type")) is dict:
            options["type"] = json.loads
        if names[0] == "--bf16":
            # As for other booleans, whose default is not None: the option alone is true.
            options |= {"nargs": "?", "const": True}
        if names[0] == "--eval_strategy":
            options["choices"] = ("no", "steps", "epoch")  # the library's error would not name the key
        if names[0] == "--report_to":
            options["nargs"] = "+"  # several trackers; the library accepts only one
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        # argparse names both forms of an option, --max_length/--max-length; keep the first.
        raise SFTError(re.sub(r"^argument --(\w+)(/--[\w-]+)?", r"\1", message))


def read_keys(path: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file. Raises SFTError if it is missing or is not flat YAML."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise SFTError(f"{path}: {problem}; give a YAML config file, such as one of those in configs/")
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, _Loader)
    except Exception as error:  # PyYAML also raises the errors of the types it constructs, such as dates
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        full_width = re.search(r"^\s*\w+\s*：", text, re.MULTILINE)  # as Chinese input methods type it
        remedy = f"; write {full_width[0].strip()[:-1].strip()}: with the colon ':', not '：'" if full_width else ""
        raise SFTError(f"{path}: not readable as YAML: {reason}{remedy}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SFTError(f"{path}: must contain only `key: value` lines")
    return values


def _convert_keys(values: dict[str, Any], name: str, parser: _Parser) -> list[str]:
    """Convert keys to command-line arguments, so that one parser handles both; check each against its field."""
    _check_known_keys(list(values), name)
    hints = typing.get_type_hints(SFTConfig)
    arguments = [
        argument for key, value in values.items() for argument in _format_arguments(name, key, value, hints[key])
    ]
    try:
        parser.parse_known_args(arguments)
    except SFTError as error:
        raise SFTError(f"{name}: {error}") from error
    return arguments


def _format_arguments(path: str, key: str, value: Any, hint: Any) -> list[str]:
    """Format one `key: value` as arguments for argparse."""
    members = _list_union_members(hint)
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list):
        value = [json.dumps(item, ensure_ascii=False) if isinstance(item, dict) else item for item in value]
        if not any(typing.get_origin(member) is list for member in members):
            raise SFTError(f"{path}: {key} takes one value, not a list")
        return [f"--{key}", *map(str, value)]
    if isinstance(value, str) and not any(_accepts_string(member) for member in members):
        is_number = re.fullmatch(r"\s*[-+]?\d[\d.]*([eE][-+]?\d+)?\s*", value)
        has_quotes = is_number or value.strip() in ("true", "false")
        expected = "true or false" if bool in members else "a number"
        remedy = "write it without quotes" if has_quotes else f"write {expected}"
        raise SFTError(f"{path}: {key} is the text {value!r} where {expected} is needed; {remedy}")
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}"]


def _list_union_members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or a tuple of the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _accepts_string(type_: Any) -> bool:
    """Return whether a string can be a value of the type: strings, enums, literals, lists and dictionaries (JSON)."""
    is_number = isinstance(type_, type) and issubclass(type_, (int, float, types.NoneType))
    return typing.get_origin(type_) is not None or not is_number


def _check_known_keys(names: list[str], source: str) -> None:
    """Raise SFTError for the first name that is not a field, and suggest the field that is meant."""
    keys = [key.name for key in dataclasses.fields(SFTConfig) if key.init]
    for name in names:
        key = name.removeprefix("--").split("=")[0]
        if key not in keys:
            suggestion = OTHER_NAMES.get(key) or difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
            raise SFTError(f"{source}: unknown key {key}; did you mean {suggestion}?")


# What other tools call our keys, where the most similar key would be another one.
OTHER_NAMES = {
    "lr": "learning_rate",
    **dict.fromkeys(("batch_size", "train_batch_size", "micro_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("model", "model_name", "model_path", "base_model"), "model_name_or_path"),
    **dict.fromkeys(("data", "data_path", "dataset", "dataset_name", "datasets", "train_file"), "train_data"),
    **dict.fromkeys(("cutoff_len", "max_seq_length", "model_max_length", "sequence_len"), "max_length"),
    **dict.fromkeys(("validation_file", "eval_dataset"), "eval_data"),
    "val_size": "held_out",
    "max_samples": "max_train_rows",
    "lora_r": "lora_rank",
    "finetuning_type": "lora",
}


def _parse_train_data(args: SFTConfig) -> list[str]:
    """Parse the entries of train_data; return each as a path, or as JSON text."""
    entries: list[Any] = [SourceEntry.parse(entry, "train_data") for entry in args.train_data]
    weighted = [entry.label for entry in entries if entry.weight is not None]
    if weighted and args.train_data_weights:
        raise SFTError(f"train_data: {weighted[0]} has a weight, and train_data_weights is set; remove one of them")
    return _format_entries(entries)


def _parse_eval_data(value: Any) -> list[str]:
    """Parse eval_data; return its entries, each as a path or as JSON text, or a mapping of names as one JSON text."""
    sets = parse_eval_data(value)
    for entry in itertools.chain(*sets.values()):
        if entry.weight is not None:
            raise SFTError(f"eval_data: {entry.label} has a weight, and each held-out row counts once; remove it")
    formatted = _format_sets(sets)
    return (
        [json.dumps(formatted, ensure_ascii=False)]
        if isinstance(formatted, dict)
        else _format_entries(sets.get(None, []))
    )


def _format_entries(entries: list[SourceEntry]) -> list[str]:
    values = [entry.format() for entry in entries]
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]


def _format_sets(sets: dict[str | None, list[SourceEntry]]) -> Any:
    """Return eval_data as a config has it: a list of entries, or a mapping of names to an entry or a list of them."""
    lists = {name: [entry.format() for entry in entries] for name, entries in sets.items()}
    if None in lists or not lists:
        return lists.get(None, [])
    return {name: entries[0] if len(entries) == 1 else entries for name, entries in lists.items()}


def _parse_mapping(key: str, value: Any) -> dict[str, Any] | None:
    """Parse the value of a key that is a mapping, which may be JSON text."""
    try:
        mapping = parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise SFTError(f'{key} is not JSON ({error}); write {{"name": value}}') from error
    if mapping is not None and not isinstance(mapping, dict):
        raise SFTError(f"{key} is {mapping!r}; it has to be {{name: value}}")
    return mapping


def _parse_template_kwargs(value: Any) -> dict[str, Any] | None:
    """Parse chat_template_kwargs: their names must be those of variables in a template."""
    kwargs = _parse_mapping("chat_template_kwargs", value)
    for name in kwargs or ():
        is_name = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
        if not is_name or name.lower() in ("true", "false", "none"):
            raise SFTError(f"chat_template_kwargs: {name!r} cannot be the name of an argument; use letters and _")
    return kwargs or None


def _check_values(args: SFTConfig) -> None:
    """Raise SFTError for values out of range and for keys that exclude each other."""
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for key in (*sizes, "max_length", "pad_to_multiple_of", "num_proc", "max_new_tokens", "lora_rank", "lora_alpha"):
        if getattr(args, key) < 1:
            raise SFTError(f"{key} is {getattr(args, key)}; it has to be 1 or more")
    counts = ("num_answers", "num_instructions", "early_stopping_patience", "tokens_per_batch", "max_train_rows")
    for key in (*counts, "eval_answer_share"):
        if (getattr(args, key) or 0) < 0:
            raise SFTError(f"{key} is {getattr(args, key)}; it has to be 0 or more")
    for key in ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon"):
        # Infinity would be found after the first steps, a negative weight_decay never.
        if not 0 <= getattr(args, key) < math.inf:
            raise SFTError(f"{key} is {getattr(args, key)}; it has to be 0 or more, and finite")
    for key in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, key) < 1:
            raise SFTError(f"{key} is {getattr(args, key)}; it has to be 0 or more, and below 1")
    for key in ("seed", "data_seed"):
        if not 0 <= (getattr(args, key) or 0) < 2**32:
            raise SFTError(f"{key} is {getattr(args, key)}; it has to be between 0 and {2**32 - 1}")
    if not 0 < args.num_train_epochs < math.inf:
        raise SFTError(f"num_train_epochs is {args.num_train_epochs}; it has to be more than 0, and finite")
    if args.save_strategy == "steps" and not args.save_steps > 0:  # the library would save nothing, in silence
        raise SFTError(f"save_steps is {args.save_steps:g}; give a number of steps, or save_strategy: no")
    if args.held_out < 0 or (args.held_out > 1 and args.held_out != int(args.held_out)):
        raise SFTError(f"held_out is {args.held_out}; give a whole number of rows, a share below 1, or 0")
    if args.push_to_hub and args.hub_strategy != "end":
        # With the other strategies the library pushes the whole output folder at each checkpoint.
        raise SFTError(f"push_to_hub needs hub_strategy: end, it is {HubStrategy(args.hub_strategy).value}")
    if args.push_evaluation and not args.push_to_hub:
        raise SFTError("push_evaluation needs push_to_hub: true")
    if args.trackio_static_space_id and not args.trackio_space_id:
        raise SFTError("trackio_static_space_id needs trackio_space_id: the log of a local run is not published")
    if args.held_out and args.eval_data:
        raise SFTError("held_out and eval_data are both set; remove one of them")
    if args.dtype not in ("float32", "bfloat16"):
        raise SFTError(f"dtype is {args.dtype}; give float32 or bfloat16 (for float16: fp16: true, over float32)")
    if args.dtype == "bfloat16" and args.fp16:
        raise SFTError("dtype: bfloat16 and fp16 exclude each other; set bf16: true, or dtype: float32")
    if args.dtype == "bfloat16" and args.bf16 and shards_model(args):
        raise SFTError("dtype: bfloat16 would become float32 under bf16 and fsdp or deepspeed; set bf16: false")
    if args.has_adapters and args.trainable_modules:
        key = "peft" if args.peft else "lora"
        raise SFTError(f"{key} and trainable_modules both select what is trained; remove one of them")
    if args.peft == {}:
        raise SFTError("peft: {} has no field; write lora: true for adapters by default, or remove it")
    for token in args.add_tokens:
        if not token or args.add_tokens.count(token) > 1:
            raise SFTError(f"add_tokens: {token!r} is {'there twice' if token else 'empty'}; remove it")
    if args.load_in_4bit and args.load_in_8bit:
        raise SFTError("load_in_4bit and load_in_8bit are both set; remove one of them")
    if args.quantization_key and shards_model(args):
        raise SFTError(
            f"{args.quantization_key}: fsdp and deepspeed do not shard quantized weights here; turn one of them off"
        )
    if args.early_stopping_patience and not args.load_best_model_at_end:
        raise SFTError("early_stopping_patience needs load_best_model_at_end: true")
    for key, reason in REFUSED_KEYS.items():
        if getattr(args, key) != TrainingArguments.__dataclass_fields__[key].default:
            raise SFTError(f"{key} {reason}")
    _check_library_values(args)
    if args.tokens_per_batch:
        _check_tokens_per_batch(args)
    if args.streaming:
        _check_streaming(args)


# Keys of TrainingArguments that would fail, or change without a word what is trained, evaluated or saved.
REFUSED_KEYS = {
    "label_smoothing_factor": "needs logits that are not computed here; set it to 0",
    "bf16_full_eval": "would cast the weights that are saved; set bf16: true, which evaluates in bf16 too",
    "fp16_full_eval": "would cast the weights that are saved; set fp16: true, which evaluates in fp16 too",
    "average_tokens_across_devices": "has to be true, as each token of a step counts alike; remove it",
    "batch_eval_metrics": "does not fit an evaluation weighted by tokens; remove it",
    "eval_do_concat_batches": "has to be true, as the metrics are sums over all batches; remove it",
    "parallelism_config": "is not supported; shard the model with fsdp or deepspeed",
    "enable_jit_checkpoint": "is not needed: SIGTERM saves a checkpoint anyway; remove it",
    "ignore_data_skip": "would train rows twice after a resume; remove it",
    "dataloader_drop_last": "would skip rows; remove it, as every epoch trains on each row once",
    "length_column_name": "names a column that encoded rows do not have; remove it, as tokens are counted",
}
PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor")  # they read no optim_args
BEST_METRICS = ("loss", "perplexity", "token_accuracy")  # of all held-out rows, and of each held-out set


def _check_library_values(args: SFTConfig) -> None:
    """Raise SFTError for values that the library would fail on with a traceback, or ignore."""
    for key in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(args, key) and not args.dataloader_num_workers:
            raise SFTError(f"{key} needs dataloader_num_workers: 1 or more")
    names = [name for name in parse_eval_data(args.eval_data) if name is not None]
    metric = str(args.metric_for_best_model)
    if args.eval_data or args.held_out or not metric.endswith(tuple(f"_{name}" for name in BEST_METRICS)):
        check_best_metric(args, names)  # else SFTTrainer does, which knows the sets of its eval_dataset
    if args.debug:
        raise SFTError(
            "debug: its hooks are on modules that fused layers do not call; remove it, a diverging loss stops the run "
            "anyway"
        )
    optimizer = getattr(args.optim, "value", args.optim)
    if args.optim_args and optimizer in PLAIN_OPTIMIZERS:
        raise SFTError(f"optim_args is not read by optim: {optimizer}; remove it")
    if args.optim_target_modules and not optimizer.startswith(("galore", "apollo")):
        raise SFTError(f"optim_target_modules is not read by optim: {optimizer}; remove it")
    accelerator: Any = args.accelerator_config
    if accelerator.split_batches or accelerator.dispatch_batches or not accelerator.even_batches:
        raise SFTError(
            "accelerator_config: split_batches, dispatch_batches and even_batches would change the rows of an "
            "evaluation; remove them"
        )
    schedule: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(args.lr_scheduler_type)]
    parameters = inspect.signature(schedule).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    own = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    known = [name for name in parameters if name not in own]
    unknown = [name for name in args.lr_scheduler_kwargs or () if name not in known]
    if unknown and not takes_any:
        name = SchedulerType(args.lr_scheduler_type).value
        raise SFTError(f"lr_scheduler_kwargs: {unknown[0]} is not one of {name}'s: {', '.join(known) or 'none'}")


def check_best_metric(args: SFTConfig, set_names: Sequence[str]) -> None:
    """Raise SFTError if metric_for_best_model is not a metric of all held-out rows or of a held-out set."""
    metric = str(args.metric_for_best_model or "loss").removeprefix("eval_")
    choices = [*BEST_METRICS, *(f"{set_name}_{name}" for set_name in set_names for name in BEST_METRICS)]
    if metric not in choices:
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise SFTError(f"metric_for_best_model is {metric}; choose {listed}")


def _check_world_size(args: TrainingArguments) -> None:
    """Raise SFTError if a launcher started several processes and this one did not join the others."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size < started:
        raise SFTError(
            f"{started} processes were started, but this one did not join the others and would train alone; "
            "check the launcher's options, or start one process"
        )


def _use_cpu_without_accelerator() -> None:
    """Let accelerate join processes over gloo where there is no accelerator, as `use_cpu: true` does.

    Otherwise each of several processes on a machine without accelerators takes itself for the only one. `use_cpu`
    itself stays as the user set it: the config that is saved may be used on another machine.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def _uses_cuda(args: TrainingArguments) -> bool:
    return torch.cuda.is_available() and not args.use_cpu and not parse_flag_from_env("ACCELERATE_USE_CPU")


def _choose_bf16(args: SFTConfig) -> bool:
    """Return whether to train in bf16 where neither the user nor a file of accelerate chose a precision: on a GPU that
    computes in it.

    `accelerate launch` exports "no" also where its file says nothing, so "no" is no choice.
    """
    if args.dtype == "bfloat16" and shards_model(args):
        return False  # under autocast accelerate would make sharded weights float32
    is_chosen = args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
    return not is_chosen and _uses_cuda(args) and torch.cuda.is_bf16_supported(including_emulation=False)


def _choose_tf32(args: SFTConfig) -> bool | None:
    """Return `tf32` of the user, else True on a GPU that has TF32, and None elsewhere.

    Raises SFTError if the user asks for it elsewhere.
    """
    has_tf32 = _uses_cuda(args) and is_torch_tf32_available()
    if args.tf32 and not has_tf32:
        raise SFTError("tf32: true needs an NVIDIA GPU of the Ampere generation or later; remove it")
    return True if args.tf32 is None and has_tf32 else args.tf32


def _check_tokens_per_batch(args: SFTConfig) -> None:
    """Raise SFTError for keys that tokens_per_batch cannot be combined with."""
    if not args.packing:
        raise SFTError("tokens_per_batch needs packing: true, as it counts the tokens of packed rows")
    if args.tokens_per_batch and args.tokens_per_batch < args.max_length:
        raise SFTError(
            f"tokens_per_batch is {args.tokens_per_batch}, less than max_length {args.max_length}; "
            "raise tokens_per_batch or lower max_length"
        )
    if args.auto_find_batch_size:
        raise SFTError("tokens_per_batch does not support auto_find_batch_size, which would change the rows of a step")
    strategy = str(args.train_sampling_strategy)
    if strategy not in ("random", "sequential"):
        raise SFTError(f"tokens_per_batch does not support train_sampling_strategy {strategy}; use random")


def _check_streaming(args: SFTConfig) -> None:
    """Raise SFTError for keys that need all rows, or their number, before training begins."""
    for key, remedy in STREAMING_REMEDIES.items():
        if getattr(args, key) != SFTConfig.__dataclass_fields__[key].default:
            raise SFTError(f"streaming: {key} needs all rows before the first step; {remedy}")
    if args.max_steps <= 0:
        raise SFTError("streaming: the end of an epoch is not known before it comes; set max_steps")
    for key in ("save_strategy", "logging_strategy"):
        if getattr(args, key) == "epoch":
            raise SFTError(f"streaming: {key}: epoch has no epochs to follow; use steps")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise SFTError(f"streaming: train_sampling_strategy {args.train_sampling_strategy} sorts all rows; use random")
    if (args.dataloader_num_workers or 0) > 1:
        raise SFTError("streaming: each worker would read and encode all rows; set dataloader_num_workers to 1 or 0")


# Keys that streaming refuses, and what to do.
STREAMING_REMEDIES = {
    "num_train_epochs": "remove it, max_steps alone counts",
    "held_out": "put the held-out rows into eval_data",
    "max_train_rows": "lower max_steps",
    "prepared_data": "remove one of them, as prepared rows are mapped and not loaded",
}


def shards_model(args: TrainingArguments) -> bool:
    """Return whether the model will be sharded: by FSDP or DeepSpeed, of the config or of accelerate's file."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(args.fsdp or args.deepspeed) or any(map(parse_flag_from_env, names))


def get_output_dir(args: TrainingArguments) -> Path:
    """Return the output folder of the run."""
    assert args.output_dir is not None  # set by TrainingArguments
    return Path(args.output_dir)


def build_config_record(args: SFTConfig) -> dict[str, Any]:
    """Return the config of a run as one flat dictionary that `train` reads again.

    It holds all keys of SFTArguments, those of TrainingArguments that differ from the default, and RECORDED_KEYS.
    """
    # Creating the arguments sets up the device, its precision and the process group of this process; other values of
    # these keys would break the run.
    kept: dict[str, Any] = {"use_cpu": args.use_cpu, "ddp_backend": args.ddp_backend, "tf32": args.tf32}
    default = SFTConfig(args.output_dir, **kept).to_dict()
    default |= {"use_cpu": False, "ddp_backend": None, "bf16": False, "fp16": False}
    own_keys = [key.name for key in dataclasses.fields(SFTArguments)]
    values = args.to_dict()
    values["train_data"] = [SourceEntry.parse(entry).format() for entry in values["train_data"]]
    values["eval_data"] = _format_sets(parse_eval_data(values["eval_data"]))
    changed = [key for key in values if key in RECORDED_KEYS or values[key] != default.get(key)]
    # Exclude secrets, which only a program can have set, and the key that would make a repeated run replace this one.
    excluded = {key for key in changed if key.endswith("token")} | {"overwrite_output_dir"}
    # Empty lists can't be written as command-line arguments, and are the defaults anyway.
    return {
        key: values[key] for key in dict.fromkeys([*own_keys, *changed]) if key not in excluded and values[key] != []
    }
