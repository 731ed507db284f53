"""The config of a run's adapters: from the keys `lora*` and `peft`, checked before the weights are loaded.

peft: {use_dora: true, modules_to_save: [lm_head]}     # LoRA, with any field of peft's LoraConfig
peft: {peft_type: IA3, target_modules: [k_proj, v_proj, down_proj], feedforward_modules: [down_proj]}
"""

from __future__ import annotations

import dataclasses
import importlib.util
import types
import typing
from typing import TYPE_CHECKING, Any

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.utils.errors import SFTError, format_first_line

if TYPE_CHECKING:
    from peft import PeftConfig

# The kinds that change modules and nothing else: trained packed, saved, loaded and merged in a test each.
KINDS = (
    *("LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "LN_TUNING", "HRA", "MISS", "SHIRA", "C3A", "ROAD"),
    *("WAVEFT", "VBLORA", "FOURIERFT", "DELORA", "GRALORA", "HIRA", "RANDLORA"),
)
REFUSED_KINDS = {
    "ADALORA": "changes the ranks from within the training loop",
    "XLORA": "mixes adapters that are trained already",
    "POLY": "needs rows with a task each",
    "ADAPTION_PROMPT": "changes attention, and packed rows have their own",
}
# Fields of LoraConfig that cannot be honoured.
REFUSED_FIELDS = {
    "lora_bias": "cannot be merged, as `chat`, `evaluate` and `export` do",
    "alora_invocation_tokens": "cannot be merged, as `chat`, `evaluate` and `export` do",
    "layer_replication": "changes the layers of the base model",
    "velora_config": "approximates gradients, in a way that depends on how rows are batched",
    "monteclora_config": "needs a loss of its own",
    "kasa_config": "needs a loss of its own, and changes the base model",
    "arrow_config": "mixes adapters that are trained already",
    "megatron_config": "is for models of Megatron",
    "use_qalora": "is for models quantized by GPTQ",
    "inference_mode": "would train nothing",
}
REFUSED_INITS = {
    "eva": "is computed from rows",
    "corda": "is computed from rows",
    "lora_ga": "is computed from the gradients of rows",
    "loftq": "replaces the base by a quantized one",
}
SET_BY_RUN = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "task_type")
SHORT_KEYS = {"r": "lora_rank", "lora_alpha": "lora_alpha", "target_modules": "lora_target_modules"}


def build_peft_config(args: SFTArguments) -> PeftConfig:
    """Build the adapters' config of the keys `lora*` and `peft`.

    Raises SFTError for a field or value that peft does not have, that a run cannot honour, or that is given twice, and
    if peft is missing.
    """
    check_peft("peft" if args.peft else "lora: true")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields: dict[str, Any] = {**args.peft} if isinstance(args.peft, dict) else {}
    kind = str(fields.pop("peft_type", "LORA"))
    _check_kind(kind)
    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]  # type: ignore[index]  # by names of PeftType
    _check_fields(fields, config_class)
    _check_init(fields.get("init_lora_weights"))
    short_keys = {field: name for field, name in SHORT_KEYS.items() if _is_set(args, name)}
    if given_twice := [field for field in short_keys if field in fields or kind != "LORA"]:
        field, name = given_twice[0], short_keys[given_twice[0]]
        reason = f"the field {field} of peft" if kind == "LORA" else f"for LoRA, and peft_type is {kind}"
        raise SFTError(f"{name} is {reason}; remove the key, and set what you want in peft")
    if kind == "LORA":
        names = args.lora_target_modules
        targets = names[0] if names == ["all-linear"] else names
        fields = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "target_modules": targets} | fields
    try:
        config = config_class(**fields, task_type="CAUSAL_LM", revision=args.revision)
    except (ValueError, TypeError, ImportError) as error:
        raise SFTError(f"peft: {format_first_line(error)}") from error
    check_peft_config(config)
    return config


def check_peft_config(config: PeftConfig) -> None:
    """Raise SFTError for a kind of adapters, a field or an initialization that a run cannot honour."""
    _check_kind(str(getattr(config.peft_type, "value", config.peft_type)))
    for field, reason in REFUSED_FIELDS.items():
        if getattr(config, field, None):
            raise SFTError(f"peft: {field} {reason}; remove it")
    _check_init(getattr(config, "init_lora_weights", None))


def _check_init(value: Any) -> None:
    if reason := REFUSED_INITS.get(str(value).lower()):
        raise SFTError(f"peft: init_lora_weights: {value} {reason}; use true, pissa or olora")


def check_peft(feature: str) -> None:
    """Raise SFTError if peft, which `feature` needs, is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise SFTError(f"{feature} needs peft; install it with `pip install 'sft_pipeline[lora]'`")


def _check_kind(kind: str) -> None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if kind in KINDS:
        return
    names = [member.value for member in PeftType]
    if kind not in names:
        raise SFTError(f"peft: peft_type {kind} is unknown; choose one of {', '.join(KINDS)}")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(kind))
    is_prompt = config_class is not None and _is_prompt_learning(config_class)
    reason = "adds tokens to the inputs, which packed rows do not have" if is_prompt else REFUSED_KINDS.get(kind)
    raise SFTError(
        f"peft: peft_type {kind} {reason or 'was not tried with packed rows'}; choose one of {', '.join(KINDS)}"
    )


def _is_prompt_learning(config_class: Any) -> bool:
    from peft import PromptLearningConfig

    return issubclass(config_class, PromptLearningConfig)


def _check_fields(fields: dict[str, Any], config_class: Any) -> None:
    """Raise SFTError for a field that the config has not, that the run sets, or whose value is of another type."""
    hints = typing.get_type_hints(config_class)
    members = {member.name for member in dataclasses.fields(config_class) if member.init}
    names = sorted(members - {"peft_type", *SET_BY_RUN, *REFUSED_FIELDS})
    for name, value in fields.items():
        if name in SET_BY_RUN:
            raise SFTError(f"peft: {name} is set by the run; remove it")
        if name not in members:
            raise SFTError(f"peft: {config_class.__name__} has no field {name}; it has {', '.join(names)}")
        if not _fits(value, hints[name]):
            raise SFTError(f"peft: {name} is {value!r}; it has to be {_describe_type(hints[name])}")


def _is_set(args: SFTArguments, name: str) -> bool:
    """Return whether a key has another value than its default."""
    field = SFTArguments.__dataclass_fields__[name]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return getattr(args, name) != default


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value of a YAML file, or one of Python, is of the type that a field of a config has."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in members)
    if origin is typing.Literal:
        # "pissa_niter_[number of iters]"
        return any(
            value == text or ("[" in str(text) and str(value).startswith(text.split("[")[0])) for text in members
        )
    if origin in (list, set):
        return isinstance(value, (list, set, tuple)) and all(_fits(item, members[0]) for item in value)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(members) and all(map(_fits, value, members))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, members[1]) for item in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe_type(hint: Any) -> str:
    """Describe a type as an error does: "int", "one of gaussian, eva" or "list of str or none"."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe_type, members))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, members))}"
    if origin in (list, set, tuple):
        return f"list of {_describe_type(members[0])}"
    if hint is type(None):
        return "none"
    return {bool: "true or false", str: "text", dict: "a mapping"}.get(origin or hint, (origin or hint).__name__)
