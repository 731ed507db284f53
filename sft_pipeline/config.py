"""What a run is told: one flat YAML file, overridden on the command line.

    sft-pipeline train configs/quickstart.yaml --learning_rate 2e-5

The keys are `transformers.TrainingArguments`' own and those of `SFTArguments` below, in one namespace. Nothing here
imports torch until `parse` is called, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
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

# Where our defaults differ from TrainingArguments', because a fine-tuning run is short and has to be looked at.
DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "logging_first_step": True,
    "eval_on_start": True,
    # accelerate's tqdm bar is replaced by ours; "passive" would hide it under accelerate launch.
    "disable_tqdm": False,
    # One line a run, also where it has several nodes.
    "log_on_each_node": False,
    # A NaN must be seen, not averaged away.
    "logging_nan_inf_filter": False,
    # A resumed run has waited for a better eval_loss as long as the one before it.
    "restore_callback_states_from_checkpoint": True,
    # What trackers call the project; the library's own is huggingface.
    "project": "sft_pipeline",
}


@dataclass
class SFTArguments:
    """The keys that are ours; each is a key of the YAML file and an option of the command line."""

    model_name_or_path: str = field(
        metadata={"help": "A hub name, a model folder, or smollm2-135m (from the package index, no hub needed)."}
    )
    train_data: list[str] = field(metadata={"help": "Files, folders or hub names of instruction rows."})
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "Held-out rows; without it `held_out` takes some from train_data."}
    )
    train_data_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "How often each train_data source is taken an epoch: 2 is twice, 0.5 half of its rows."},
    )
    held_out: float = field(
        default=0.0,
        metadata={"help": "Rows of train_data kept for evaluation: a number from 1 on, a share below 1, 0 for none."},
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave malformed rows out and count them; else the first one is an error."}
    )
    template: Literal["role", "chat"] = field(
        default="chat", metadata={"help": "role: \\n#SYSTEM: \\n#USER: \\n#ASSISTANT:; chat: the tokenizer's own."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "Used for rows that bring no system message."})
    train_on: Literal["all", "last"] = field(
        default="all", metadata={"help": "Which assistant turns are trained: all of a conversation's, or its last."}
    )
    max_length: int = field(default=1024, metadata={"help": "Most tokens a row may have."})
    overlong: Literal["drop", "truncate_answer", "truncate_turns"] = field(
        default="drop", metadata={"help": "What becomes of a longer row; truncate_turns takes the oldest turns away."}
    )
    packing: bool = field(
        default=True, metadata={"help": "Lay a batch's rows end to end, without padding and their common start once."}
    )
    tokens_per_batch: int = field(
        default=0,
        metadata={"help": "With packing: a batch is filled with rows up to so many tokens; 0 counts rows instead."},
    )
    pad_to_multiple_of: int = field(default=8, metadata={"help": "Without packing: padded length is a multiple of it."})
    lora: bool = field(default=False, metadata={"help": "Train low-rank adapters (peft) instead of all parameters."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Their outputs are multiplied by lora_alpha / lora_rank."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the linear layers that get adapters."}
    )
    lora_merge: bool = field(default=False, metadata={"help": "Save the merged model instead of the adapters."})
    trainable_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Train only parameters whose name one of these regular expressions is found in: self_attn."},
    )
    max_train_rows: int = field(
        default=0, metadata={"help": "Train on so many rows at most, chosen by content hash; 0 is all."}
    )
    prepared_data: str | None = field(
        default=None, metadata={"help": "The folder that `prepare` writes; training maps its rows and encodes none."}
    )
    num_proc: int = field(default=2, metadata={"help": "Processes that encode rows."})
    num_answers: int = field(
        default=5, metadata={"help": "Held-out prompts answered before training, at evaluations and after it."}
    )
    num_instructions: int = field(
        default=24, metadata={"help": "Instructions whose answers code checks, asked with them; there are 74."}
    )
    eval_answer_share: float = field(
        default=0.1,
        metadata={
            "help": "Answers at evaluations on the way take at most this share of the training time: fewer are asked."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens an answer may have."})
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after this many evaluations without a better eval_loss; 0 never stops."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run that output_dir holds."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a hub model brings along."})


class _Loader(yaml.SafeLoader):
    """Safe YAML with two rules of YAML 1.2 where PyYAML has those of 1.1: 1e-5 is a number, and of words only true and
    false are truth values, so that `save_strategy: no` is what it says."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def parse_config(config: str | None, overrides: Sequence[str] = ()) -> tuple[SFTArguments, TrainingArguments]:
    """Read `config` (a YAML file, or None) and `overrides` (["--key", "value", ...]), the latter winning.

    Raises SFTError for a file that is missing or no flat YAML, an unknown key, or a value of the wrong type.
    """
    return parse_keys(read_keys(Path(config)) if config else {}, config or "run", overrides)


def parse_keys(
    keys: dict[str, Any], name: str = "run", overrides: Sequence[str] = ()
) -> tuple[SFTArguments, TrainingArguments]:
    """As `parse`, for the keys of a dictionary; `name` stands in the errors and in the default `output_dir`."""
    parser = _build_parser()
    from_file = _convert_keys(keys, name, parser)
    try:
        sft, training, unknown = parser.parse_args_into_dataclasses(
            args=[*from_file, *overrides], return_remaining_strings=True, look_for_args_file=False
        )
    except Exception as error:
        # TrainingArguments checks its own fields against each other and against this machine; some of what it calls
        # reads files or computes before it checks.
        raise SFTError(format_error(error, limit=400)) from error
    _check_known_keys([name for name in unknown if name.startswith("--")] or unknown, parser, "the command line")
    _check_values(sft, training)
    if training.output_dir == "trainer_output":
        training.output_dir = str(Path("outputs") / Path(name).stem)
    _evaluate_when_there_are_rows(sft, training)
    return sft, training


def _build_parser() -> HfArgumentParser:
    """A parser of both dataclasses whose errors are ours, not a page of usage."""
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            missing = re.match(r"the following arguments are required: (.*)", message)
            if missing:
                keys = re.sub(r"--(\w+)/--[\w-]+|--(\w+)", r"\1\2", missing[1])
                raise SFTError(f"missing: {keys}; add it to the config file or the command line")
            # argparse spells both forms of an option, --max_length/--max-length; one is enough.
            raise SFTError(re.sub(r"^argument --(\w+)(/--[\w-]+)?", r"\1", message))

    classes: Any = (SFTArguments, TrainingArguments)
    parser = Parser(classes, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    # The library reads it as the text of an older release, unless it stands without a value.
    parser._option_string_actions["--fsdp"].type = lambda text: {"true": True, "false": None}.get(text.lower(), text)
    # A list of trackers, of which the library's parser takes one.
    next(action for action in parser._actions if action.dest == "report_to").nargs = "+"
    return parser


def read_keys(path: Path) -> dict[str, Any]:
    """The file's keys and values. Raises SFTError for a file that is missing or no YAML of keys and values."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise SFTError(f"{path}: {found}; give a YAML file of keys, the project's own are in configs/")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except Exception as error:  # beside its own errors, PyYAML lets through those of whatever it builds: dates, numbers
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise SFTError(f"{path}: not readable as YAML, as a config is: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SFTError(f"{path}: needs to be a flat list of `key: value` lines")
    return values


def _convert_keys(values: dict[str, Any], name: str, parser: HfArgumentParser) -> list[str]:
    """The keys as command-line arguments, each checked against its field, so that both go one way from here."""
    _check_known_keys(list(values), parser, name)
    hints = _resolve_field_types(parser)
    arguments = [word for key, value in values.items() for word in _format_arguments(name, key, value, hints[key])]
    try:
        parser.parse_known_args(["--model_name_or_path=", "--train_data=", *arguments])
    except SFTError as error:
        raise SFTError(f"{name}: {error}") from error
    return arguments


def _format_arguments(path: str, key: str, value: Any, hint: Any) -> list[str]:
    """One `key: value` as the words that argparse reads."""
    kinds = _list_union_members(hint)
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list):
        if not any(typing.get_origin(kind) is list for kind in kinds):
            raise SFTError(f"{path}: {key} takes one value, not a list")
        return [f"--{key}", *map(str, value)]
    if isinstance(value, str) and not any(kind in (str, list) or _is_text_like(kind) for kind in kinds):
        needed = "a number or true/false is needed; write it without quotes"
        raise SFTError(f"{path}: {key} is the text {value!r} where {needed}")
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}"]


def _list_union_members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_text_like(kind: Any) -> bool:
    """Whether a text may stand for it: enums, literals, lists of texts and dictionaries (JSON)."""
    return typing.get_origin(kind) is not None or (isinstance(kind, type) and not issubclass(kind, (int, float)))


def _resolve_field_types(parser: HfArgumentParser) -> dict[str, Any]:
    """Field name to resolved type, over both dataclasses."""
    return {name: hint for cls in parser.dataclass_types for name, hint in typing.get_type_hints(cls).items()}


def _check_known_keys(names: list[str], parser: HfArgumentParser, where: str) -> None:
    """Raise SFTError for the first name that is no field, with the nearest field's name."""
    known = [f.name for cls in parser.dataclass_types for f in dataclasses.fields(cls) if f.init]
    for name in names:
        bare = name.removeprefix("--").split("=")[0]
        if bare not in known:
            nearest = difflib.get_close_matches(bare, known, n=1, cutoff=0.0)[0]
            raise SFTError(f"{where}: unknown key {bare}; the nearest known one is {nearest}")


def _check_values(sft: SFTArguments, training: TrainingArguments) -> None:
    """Raise SFTError for values that no later step could make sense of."""
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
        raise SFTError("hub_token: a config and a command line are kept and seen; set HF_TOKEN or call `hf auth login`")
    if training.push_to_hub and training.hub_strategy != "end":
        from transformers.trainer_utils import HubStrategy

        # On the way, the library would push its pickle of the arguments.
        raise SFTError(f"push_to_hub needs hub_strategy: end, it is {HubStrategy(training.hub_strategy).value}")
    if sft.held_out and sft.eval_data:
        raise SFTError("held_out and eval_data are both given; keep one, or held-out rows would have two sources")
    if sft.lora and sft.trainable_modules:
        raise SFTError("lora and trainable_modules both say what is trained; keep one")
    if sft.early_stopping_patience and not training.load_best_model_at_end:
        raise SFTError("early_stopping_patience needs load_best_model_at_end: true")
    if training.dataloader_drop_last:
        raise SFTError("dataloader_drop_last would leave rows out; every epoch trains each row once, so take it away")
    if sft.tokens_per_batch:
        _check_tokens_per_batch(sft, training)


def _check_tokens_per_batch(sft: SFTArguments, training: TrainingArguments) -> None:
    """Raise SFTError for what a budget of tokens cannot go with."""
    if not sft.packing:
        raise SFTError("tokens_per_batch counts the tokens of packed rows; it needs packing: true")
    if sft.tokens_per_batch < sft.max_length:
        raise SFTError(
            f"tokens_per_batch is {sft.tokens_per_batch}, and a row may have {sft.max_length} tokens (max_length); "
            "raise the one or lower the other"
        )
    strategy = str(training.train_sampling_strategy)
    if strategy not in ("random", "sequential"):
        raise SFTError(f"tokens_per_batch makes batches of its own; train_sampling_strategy {strategy} can't be kept")


def _evaluate_when_there_are_rows(sft: SFTArguments, training: TrainingArguments) -> None:
    """Evaluation is on (at step 0 and every epoch) where there are held-out rows, and off where there are none."""
    from transformers.trainer_utils import IntervalStrategy

    if not (sft.eval_data or sft.held_out):
        training.eval_on_start, training.eval_strategy = False, IntervalStrategy.NO
    elif training.eval_strategy == IntervalStrategy.NO:
        training.eval_strategy = IntervalStrategy.EPOCH


def get_output_dir(training: TrainingArguments) -> Path:
    """The run's output folder, which config.py always names."""
    assert training.output_dir is not None
    return Path(training.output_dir)


def build_config_record(sft: SFTArguments, training: TrainingArguments) -> dict[str, Any]:
    """Our keys, and those of TrainingArguments that were given, as one flat dictionary that `train` reads again."""
    from transformers import TrainingArguments

    # Making TrainingArguments sets up the process' device and group; told otherwise, they would end a distributed run.
    default = TrainingArguments(
        output_dir=training.output_dir, use_cpu=training.use_cpu, ddp_backend=training.ddp_backend
    ).to_dict()
    default |= {"use_cpu": False, "ddp_backend": None}
    given = {key: value for key, value in training.to_dict().items() if value != default.get(key)}
    # With DEFAULTS, for the library's default of such a key would be read back as ours.
    for key in ("output_dir", "learning_rate", "seed", "num_train_epochs", "per_device_train_batch_size", *DEFAULTS):
        given.setdefault(key, getattr(training, key))
    # Secrets (given by a program: a config can't hold one), and what would make a repeated run replace this one.
    left_out = {key for key in given if key.endswith("token")} | {"overwrite_output_dir"}
    # An empty list has no spelling on the command line, which every key goes through; it is the default anyway.
    return {key: value for key, value in {**asdict(sft), **given}.items() if key not in left_out and value != []}
