"""Configuration of a run: a flat YAML file and command-line overrides.

    sft-pipeline train configs/quickstart.yaml --learning_rate 2e-5

The keys are those of `transformers.TrainingArguments` and of `SFTArguments` below, in one namespace. torch is imported
only when a config is parsed, so that `--help` is fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import yaml

from sft_pipeline.utils.errors import SFTError, format_error

if TYPE_CHECKING:
    from transformers import HfArgumentParser, TrainingArguments

# Defaults that differ from those of TrainingArguments, as a fine-tuning run is short and should be easy to follow.
DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "logging_first_step": True,
    "eval_on_start": True,
    # Training shows its own progress bar; the library's default, "passive", would hide it under accelerate launch.
    "disable_tqdm": False,
    # Each message is logged once, also on several nodes.
    "log_on_each_node": False,
    # A NaN loss must appear in the log, not be left out of the average.
    "logging_nan_inf_filter": False,
    # Early stopping counts the evaluations before a resume, too.
    "restore_callback_states_from_checkpoint": True,
    # The project name in trackers; the library's default is huggingface.
    "project": "sft_pipeline",
}


@dataclass
class SFTArguments:
    """The keys of this package; each is a key of the YAML file and an option of the command line."""

    model_name_or_path: str = field(
        metadata={"help": "Model to train: a hub name, a model folder, or smollm2-135m (from the package index)."}
    )
    train_data: list[str] = field(
        metadata={"help": "Training data: files, folders or hub names of datasets with instruction rows."}
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Held-out data, given like train_data; without it, `held_out` splits rows off train_data."},
    )
    train_data_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Times that each source of train_data is used per epoch: 2 is twice, 0.5 uses half of its rows."
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
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message for rows that have none of their own."}
    )
    train_on: Literal["all", "last"] = field(
        default="all",
        metadata={"help": "Assistant turns that the loss is computed on: all turns of a conversation, or the last."},
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "Maximum number of tokens in a row; longer rows are handled by `overlong`."},
    )
    overlong: Literal["drop", "truncate_answer", "truncate_turns"] = field(
        default="drop",
        metadata={
            "help": "How to handle rows above max_length: drop them, cut off their end or remove their oldest turns."
        },
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Concatenate the rows of a batch without padding, and compute their common prefix once."},
    )
    tokens_per_batch: int = field(
        default=0,
        metadata={
            "help": "With packing, maximum number of tokens in a device's batch; 0 sizes batches by number of rows."
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
        metadata={
            "help": "Number of held-out prompts answered before training, at each evaluation and after training."
        },
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
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that a model repository contains."}
    )


class _Loader(yaml.SafeLoader):
    """Safe YAML loader with two rules of YAML 1.2 instead of 1.1: `1e-5` is a number, and only `true` and `false` are
    booleans, so that `save_strategy: no` is a string."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def parse_config(config: str | None, overrides: Sequence[str] = ()) -> tuple[SFTArguments, TrainingArguments]:
    """Parse `config` (a YAML file, or None) and `overrides` (["--key", "value", ...]), which take precedence.

    Raises SFTError for a file that is missing or not flat YAML, an unknown key, or an invalid value.
    """
    return parse_keys(read_keys(Path(config)) if config else {}, config or "run", overrides)


def parse_keys(
    keys: dict[str, Any], name: str = "run", overrides: Sequence[str] = ()
) -> tuple[SFTArguments, TrainingArguments]:
    """Parse the keys of a dictionary like `parse_config`; `name` is used in errors and in the default `output_dir`."""
    _use_cpu_without_accelerator()
    parser = _build_parser()
    from_file = _convert_keys(keys, name, parser)
    try:
        sft, training, unknown = parser.parse_args_into_dataclasses(
            args=[*from_file, *overrides], return_remaining_strings=True, look_for_args_file=False
        )
    except Exception as error:
        # TrainingArguments validates its fields against each other and the machine, with exceptions of many types.
        raise SFTError(format_error(error, limit=400)) from error
    _check_known_keys([name for name in unknown if name.startswith("--")] or unknown, parser, "the command line")
    _check_values(sft, training)
    _check_world_size(training)
    if training.output_dir == "trainer_output":
        training.output_dir = str(Path("outputs") / Path(name).stem)
    _set_eval_strategy(sft, training)
    return sft, training


def _build_parser() -> HfArgumentParser:
    """Build a parser of both dataclasses that raises SFTError instead of printing its usage."""
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            missing = re.match(r"the following arguments are required: (.*)", message)
            if missing:
                keys = re.sub(r"--(\w+)/--[\w-]+|--(\w+)", r"\1\2", missing[1])
                raise SFTError(f"missing: {keys}; add it to the config file or the command line")
            # argparse names both forms of an option, --max_length/--max-length; keep the first.
            raise SFTError(re.sub(r"^argument --(\w+)(/--[\w-]+)?", r"\1", message))

    classes: Any = (SFTArguments, TrainingArguments)
    parser = Parser(classes, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    # The library's parser reads a value of --fsdp as a string, as older releases did; true and false must be booleans.
    parser._option_string_actions["--fsdp"].type = lambda text: {"true": True, "false": None}.get(text.lower(), text)
    # report_to takes several trackers; the library's parser accepts only one.
    next(action for action in parser._actions if action.dest == "report_to").nargs = "+"
    return parser


def read_keys(path: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file. Raises SFTError if it is missing or is not flat YAML."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise SFTError(f"{path}: {problem}; give a YAML config file, such as one of those in configs/")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except Exception as error:  # PyYAML also raises the errors of the types it constructs, such as dates
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise SFTError(f"{path}: not readable as YAML: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SFTError(f"{path}: must contain only `key: value` lines")
    return values


def _convert_keys(values: dict[str, Any], name: str, parser: HfArgumentParser) -> list[str]:
    """Convert keys to command-line arguments, so that one parser handles both; check each against its field."""
    _check_known_keys(list(values), parser, name)
    hints = _resolve_field_types(parser)
    arguments = [
        argument for key, value in values.items() for argument in _format_arguments(name, key, value, hints[key])
    ]
    try:
        parser.parse_known_args(["--model_name_or_path=", "--train_data=", *arguments])
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
        if not any(typing.get_origin(member) is list for member in members):
            raise SFTError(f"{path}: {key} takes one value, not a list")
        return [f"--{key}", *map(str, value)]
    if isinstance(value, str) and not any(_accepts_string(member) for member in members):
        expected = "a number or true/false is needed; write it without quotes"
        raise SFTError(f"{path}: {key} is the text {value!r} where {expected}")
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}"]


def _list_union_members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or a tuple of the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _accepts_string(type_: Any) -> bool:
    """Return whether a string can be a value of the type: strings, enums, literals, lists and dictionaries (JSON)."""
    return typing.get_origin(type_) is not None or (isinstance(type_, type) and not issubclass(type_, (int, float)))


def _resolve_field_types(parser: HfArgumentParser) -> dict[str, Any]:
    """Return the resolved type of each field of both dataclasses, by name."""
    return {name: hint for cls in parser.dataclass_types for name, hint in typing.get_type_hints(cls).items()}


def _check_known_keys(names: list[str], parser: HfArgumentParser, source: str) -> None:
    """Raise SFTError for the first name that is not a field, and suggest the most similar field."""
    keys = [f.name for cls in parser.dataclass_types for f in dataclasses.fields(cls) if f.init]
    for name in names:
        key = name.removeprefix("--").split("=")[0]
        if key not in keys:
            suggestion = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
            raise SFTError(f"{source}: unknown key {key}; did you mean {suggestion}?")


def _check_values(sft: SFTArguments, training: TrainingArguments) -> None:
    """Raise SFTError for values out of range and for keys that exclude each other."""
    for key in ("max_length", "pad_to_multiple_of", "num_proc", "max_new_tokens", "lora_rank", "lora_alpha"):
        if getattr(sft, key) < 1:
            raise SFTError(f"{key} is {getattr(sft, key)}; it has to be 1 or more")
    counts = ("num_answers", "num_instructions", "early_stopping_patience", "tokens_per_batch", "max_train_rows")
    for key in (*counts, "eval_answer_share"):
        if getattr(sft, key) < 0:
            raise SFTError(f"{key} is {getattr(sft, key)}; it has to be 0 or more")
    if sft.held_out < 0 or (sft.held_out > 1 and sft.held_out != int(sft.held_out)):
        raise SFTError(f"held_out is {sft.held_out}; give a whole number of rows, a share below 1, or 0")
    if training.hub_token:
        raise SFTError(
            "hub_token: configs and command lines are saved and can be read; set HF_TOKEN or call `hf auth login`"
        )
    if training.push_to_hub and training.hub_strategy != "end":
        from transformers.trainer_utils import HubStrategy

        # With the other strategies the library also pushes its pickled arguments.
        raise SFTError(f"push_to_hub needs hub_strategy: end, it is {HubStrategy(training.hub_strategy).value}")
    if sft.held_out and sft.eval_data:
        raise SFTError("held_out and eval_data are both set; remove one of them")
    if sft.lora and sft.trainable_modules:
        raise SFTError("lora and trainable_modules both select what is trained; remove one of them")
    if sft.early_stopping_patience and not training.load_best_model_at_end:
        raise SFTError("early_stopping_patience needs load_best_model_at_end: true")
    if training.dataloader_drop_last:
        raise SFTError("dataloader_drop_last would skip rows; remove it, as every epoch trains on each row once")
    if sft.tokens_per_batch:
        _check_tokens_per_batch(sft, training)


def _check_world_size(training: TrainingArguments) -> None:
    """Raise SFTError if a launcher started several processes and this one did not join the others."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if training.world_size < started:
        raise SFTError(
            f"{started} processes were started, but this one did not join the others and would train alone; "
            "check the launcher's options, or start one process"
        )


def _use_cpu_without_accelerator() -> None:
    """Let accelerate join processes over gloo where there is no accelerator, as `use_cpu: true` does.

    Otherwise each of several processes on a machine without accelerators takes itself for the only one. `use_cpu`
    itself stays as the user set it: the config that is saved may be used on another machine.
    """
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def _check_tokens_per_batch(sft: SFTArguments, training: TrainingArguments) -> None:
    """Raise SFTError for keys that tokens_per_batch cannot be combined with."""
    if not sft.packing:
        raise SFTError("tokens_per_batch needs packing: true, as it counts the tokens of packed rows")
    if sft.tokens_per_batch < sft.max_length:
        raise SFTError(
            f"tokens_per_batch is {sft.tokens_per_batch}, less than max_length {sft.max_length}; "
            "raise tokens_per_batch or lower max_length"
        )
    strategy = str(training.train_sampling_strategy)
    if strategy not in ("random", "sequential"):
        raise SFTError(f"tokens_per_batch does not support train_sampling_strategy {strategy}; use random")


def _set_eval_strategy(sft: SFTArguments, training: TrainingArguments) -> None:
    """Turn evaluation off, also at step 0, if there are no held-out rows; otherwise evaluate every epoch by default."""
    from transformers.trainer_utils import IntervalStrategy

    if not (sft.eval_data or sft.held_out):
        training.eval_on_start, training.eval_strategy = False, IntervalStrategy.NO
    elif training.eval_strategy == IntervalStrategy.NO:
        training.eval_strategy = IntervalStrategy.EPOCH


def get_output_dir(training: TrainingArguments) -> Path:
    """Return the output folder of the run."""
    assert training.output_dir is not None  # set by parse_keys
    return Path(training.output_dir)


def build_config_record(sft: SFTArguments, training: TrainingArguments) -> dict[str, Any]:
    """Return the config of a run as one flat dictionary that `train` reads again.

    It holds all keys of SFTArguments and those of TrainingArguments that differ from the library's defaults.
    """
    from transformers import TrainingArguments

    # Creating TrainingArguments sets up the device and the process group of this process; with other values of use_cpu
    # and ddp_backend it would break a distributed run.
    default = TrainingArguments(
        output_dir=training.output_dir, use_cpu=training.use_cpu, ddp_backend=training.ddp_backend
    ).to_dict()
    default |= {"use_cpu": False, "ddp_backend": None}
    changed = {key: value for key, value in training.to_dict().items() if value != default.get(key)}
    # Keys of DEFAULTS are always recorded: a missing key would be read again as our default, not as the library's.
    for key in ("output_dir", "learning_rate", "seed", "num_train_epochs", "per_device_train_batch_size", *DEFAULTS):
        changed.setdefault(key, getattr(training, key))
    # Exclude secrets, which only a program can have set, and the key that would make a repeated run replace this one.
    excluded = {key for key in changed if key.endswith("token")} | {"overwrite_output_dir"}
    # Empty lists can't be written as command-line arguments, and are the defaults anyway.
    return {key: value for key, value in {**asdict(sft), **changed}.items() if key not in excluded and value != []}
