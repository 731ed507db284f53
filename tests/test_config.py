"""The config: files and command line, and a one-line error for each mistake in them."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments, training_args
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy

from sft_pipeline import config
from sft_pipeline.config import SFTConfig, build_config_record, parse_config, parse_keys
from sft_pipeline.training.sft_trainer import set_evaluation_arguments
from sft_pipeline.utils.errors import SFTError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
RATES = ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon")
NEEDED = "model_name_or_path: m\ntrain_data: rows.json\n"


@pytest.fixture
def write(tmp_path):
    """write(text) is the path of a config with the two needed keys and `text`."""

    def write(text: str, needed: str = NEEDED) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(needed + text, encoding="utf-8")
        return str(path)

    return write


def refusal(config: str | None, *overrides: str) -> str:
    with pytest.raises(SFTError) as caught:
        parse_config(config, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


# A study's own keys are read by study.py: tests/commands/test_study.py.
RUNS = [path for path in CONFIGS if not path.stem.startswith("study_")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_config_of_the_project_parses(path):
    args = parse_config(str(path), [])
    assert args.train_data and (args.held_out > 0 or args.eval_data)
    assert args.eval_on_start and args.eval_strategy != IntervalStrategy.NO
    assert args.output_dir == f"outputs/{path.stem}"


def test_the_project_has_configs():
    assert {path.stem for path in CONFIGS} >= {"quickstart", "alpaca_qwen3", "alpaca_smollm2", "two_languages"}


def test_the_reference_run():
    args = parse_config(str(next(path for path in CONFIGS if path.stem == "alpaca_qwen3")), [])
    assert (args.model_name_or_path, args.train_data, args.template) == (
        "Qwen/Qwen3-0.6B",
        ["tatsu-lab/alpaca"],
        "role",
    )
    assert args.system_prompt == "你是小冬瓜智能体,请安全详细回答用户 USER 的问题"
    assert (args.learning_rate, args.max_steps) == (1e-5, 1000)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 10)


def test_defaults_of_the_package_and_of_transformers(write):
    args = parse_config(write(""), [])
    assert (args.template, args.train_on, args.overlong, args.max_length) == ("chat", "all", "drop", 1024)
    assert (args.logging_steps, args.logging_first_step, args.eval_strategy, args.eval_on_start) == (
        10,
        True,
        "epoch",
        True,
    )
    assert (args.disable_tqdm, args.logging_nan_inf_filter, args.log_on_each_node) == (False, False, False)
    assert args.per_device_train_batch_size == 8 and args.weight_decay == 0.0
    assert args.output_dir == "outputs/mine"


@pytest.mark.parametrize(("written", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("2.e-5", 2e-5), ("1.5e+1", 15.0)])
def test_a_power_of_ten_is_a_number(write, written, value):
    assert parse_config(write(f"learning_rate: {written}"), []).learning_rate == value
    assert parse_config(write(""), ["--learning_rate", written]).learning_rate == value


def test_a_number_in_quotes(write):
    config = write('learning_rate: "1e-5"')
    assert refusal(config) == (
        f"{config}: learning_rate is the text '1e-5' where a number is needed; write it without quotes"
    )
    assert "max_length is the text '512'" in refusal(write("max_length: '512'"))
    assert "packing is the text 'true'" in refusal(write("packing: 'true'"))


def test_the_command_line_takes_precedence(write):
    config = write("learning_rate: 1e-5\nmax_length: 64\npacking: true\n")
    overrides = [
        "--learning_rate=2e-5",
        "--train_data",
        "a.json",
        "b.json",
        "--packing",
        "false",
        "--output_dir",
        "here",
    ]
    args = parse_config(config, overrides)
    assert (args.learning_rate, args.output_dir) == (2e-5, "here")
    assert (args.train_data, args.max_length, args.packing) == (["a.json", "b.json"], 64, False)


def test_lists_dictionaries_nothing_and_flags(write):
    text = "train_data_weights: [1, 0.5]\nsystem_prompt:\nskip_bad_rows: true\n"
    text += "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    args = parse_config(write(text, needed="model_name_or_path: m\ntrain_data: [a.json, b.json]\n"), [])
    assert (args.train_data, args.train_data_weights) == (["a.json", "b.json"], [1.0, 0.5])
    assert args.system_prompt is None and args.skip_bad_rows is True
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    "text", ["{enable_thinking: false, mode: '42'}", '\'{"enable_thinking": false, "mode": "42"}\'']
)
def test_template_arguments_are_an_object_or_json_text(write, text):
    kwargs = {"enable_thinking": False, "mode": "42"}
    assert parse(write(f"chat_template_kwargs: {text}")) == kwargs
    assert parse(write(""), "--chat_template_kwargs", json.dumps(kwargs)) == kwargs
    assert parse(write("chat_template_kwargs: {}")) is parse(write("")) is None


def parse(path, *words):
    return parse_config(path, list(words)).chat_template_kwargs


@pytest.mark.parametrize("arguments", [["--fsdp"], ["--fsdp", "true"], ["--fsdp=True"]])
def test_fsdp_is_a_boolean(write, arguments):
    """The library's parser reads it as a string."""
    for args in (parse_config(write("fsdp: true"), []), parse_config(write(""), [*arguments])):
        assert args.fsdp is True and args.fsdp_plugin_args["fsdp_version"] == 2
    assert not parse_config(write("fsdp: true"), ["--fsdp", "false"]).fsdp
    assert "Unknown `fsdp` option: sideways" in refusal(write("fsdp: sideways"))


def test_a_dictionary_may_be_in_a_separate_file(write, tmp_path):
    file = tmp_path / "fsdp.json"
    file.write_text('{"state_dict_type": "SHARDED_STATE_DICT"}')
    args = parse_config(write("fsdp: true"), ["--fsdp_config", str(file)])
    assert args.fsdp_config["state_dict_type"] == "SHARDED_STATE_DICT"
    assert args.fsdp_plugin_args["reshard_after_forward"] is True


def test_the_precision_of_accelerates_file_is_recorded(write, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = parse_config(write(""))
    assert args.bf16 and build_config_record(args)["bf16"] is True
    assert parse_config(write("bf16: false\n")).mixed_precision == "no", "the config overrides the file"
    assert SFTConfig.from_training_arguments(TrainingArguments(use_cpu=True)).bf16, "TrainingArguments name none"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # accelerate always sets it: no wish of the user's
    assert parse_config(write("bf16: true\nuse_cpu: true\n")).mixed_precision == "bf16"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with bf16 and TF32, as far as the precision is chosen by it; returns the precision that torch was set to.

    The device itself stays the CPU, except that its type is "cuda".
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(config, "_use_cpu_without_accelerator", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(config, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    precisions = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr(TrainingArguments, "device", property(lambda args: SimpleNamespace(type="cuda", index=0)))
    monkeypatch.setattr(TrainingArguments, "n_gpu", 1)
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    return precisions


@pytest.mark.parametrize(
    ("keys", "of_file", "precision"),
    [
        ("", "no", "bf16"),
        ("bf16: true", "no", "bf16"),
        ("bf16: false", "no", "no"),
        ("fp16: true", "no", "fp16"),
        ("", "fp16", "fp16"),
        ("", "fp8", "fp8"),
        ("bf16: false", "bf16", "no"),
        ("bf16: true", "fp16", "bf16"),
    ],
)
def test_a_gpu_trains_in_bf16_unless_the_user_or_accelerates_file_says_otherwise(
    keys, of_file, precision, write, gpu, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", of_file)
    args = parse_config(write(keys))
    assert args.mixed_precision == precision
    assert (args.bf16, args.fp16) == (precision == "bf16", precision == "fp16")
    record = build_config_record(args)
    assert record["bf16"] is args.bf16 and record.get("fp16", False) is args.fp16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    if precision != "fp8":
        repeated = parse_keys(record)
        assert repeated.mixed_precision == precision, "its record trains alike, whatever the defaults are then"


def test_no_bf16_by_default_without_a_gpu_that_computes_in_it(write, gpu, monkeypatch):
    assert not parse_config(write("use_cpu: true")).bf16
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not parse_config(write("")).bf16
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert parse_config(write("")).bf16 and parse_config(write(""), ["--bf16"]).bf16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not parse_config(write("")).bf16, "a V100 emulates it"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not parse_config(write("")).bf16, "such as on MPS"


def test_tf32_is_on_by_default_where_a_gpu_has_it(write, gpu, monkeypatch):
    args = parse_config(write(""))
    assert args.tf32 is True and build_config_record(args)["tf32"] is True and gpu == ["high", "high"]
    args = parse_config(write("tf32: false"))
    assert args.tf32 is False and build_config_record(args)["tf32"] is False and gpu[2:] == ["highest", "highest"]
    monkeypatch.setattr(config, "is_torch_tf32_available", lambda: False)
    assert parse_config(write("")).tf32 is None and len(gpu) == 4
    message = "tf32: true needs an NVIDIA GPU of the Ampere generation or later; remove it"
    assert refusal(write("tf32: true")) == message


def test_on_a_cpu_the_precision_of_products_is_not_touched(write, monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: pytest.fail(precision))
    args = parse_config(write("use_cpu: true"))
    assert args.tf32 is None and not args.bf16 and parse_config(write("use_cpu: true\ntf32: false")).tf32 is False


def test_tf32_by_the_older_setting_leaves_both_readable():
    """torch's newer one makes the older one, which inductor reads, unreadable."""
    script = """
import torch
torch.set_float32_matmul_precision("high")
assert torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.backends.cuda.matmul.allow_tf32
assert torch.get_float32_matmul_precision() == "high"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_keys_that_the_librarys_parser_cannot_read(write):
    args = parse_config(write("liger_kernel_config: {rope: true}\ninclude_num_input_tokens_seen: non_padding\n"))
    assert (args.liger_kernel_config, args.include_num_input_tokens_seen) == ({"rope": True}, "non_padding")
    args = parse_config(write("include_num_input_tokens_seen: true\n"))
    assert args.include_num_input_tokens_seen == "all"
    assert refusal(write("include_num_input_tokens_seen: many\n"))


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_key_without_the_package(write, tmp_path):
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    message = "deepspeed needs a package that is not installed: pip install deepspeed"
    assert refusal(write(""), "--deepspeed", str(tmp_path / "zero3.json")) == message
    unset_hf_deepspeed_config()  # transformers keeps the partly built config


@pytest.mark.parametrize("text", ["", "-", "--not an option", "a: b # c", "100", "行\n行 ", " spaces "])
def test_a_text_stays_as_it_is(write, text):
    assert parse_config(write(f"system_prompt: {json.dumps(text)}\n"), []).system_prompt == text


def test_without_a_file():
    args = parse_config(None, ["--model_name_or_path", "m", "--train_data", "a.json"])
    assert (args.model_name_or_path, args.output_dir) == ("m", "outputs/run")


def test_evaluation_is_off_without_held_out_rows(write):
    """As SFTTrainer finds out; a strategy of the user's own stays where there are rows."""
    for text, strategy in (
        ("", "epoch"),
        ("eval_strategy: steps\neval_steps: 3\n", "steps"),
        ("eval_strategy: no", "no"),
    ):
        with_rows, without = parse_config(write(text)), parse_config(write(text))
        set_evaluation_arguments(with_rows, has_held_out_rows=True)
        set_evaluation_arguments(without, has_held_out_rows=False)
        assert with_rows.eval_on_start and with_rows.eval_strategy == strategy
        assert not without.eval_on_start and without.eval_strategy == IntervalStrategy.NO


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        *[("learning_rte", "learning_rate"), ("max_len", "max_length"), ("modelname", "model_name_or_path")],
        *[("epochs", "num_train_epochs"), ("warmup_ratio", "warmup_steps"), ("evaluation_strategy", "eval_strategy")],
        *config.OTHER_NAMES.items(),
    ],
)
def test_an_unknown_key_names_the_nearest(write, wrong, nearest):
    config = write(f"{wrong}: 1\n")
    assert refusal(config) == f"{config}: unknown key {wrong}; did you mean {nearest}?"
    message = f"the command line: unknown key {wrong}; did you mean {nearest}?"
    assert refusal(write(""), f"--{wrong}", "1") == message
    assert refusal(write(""), f"--{wrong}=1") == message


def test_names_of_other_tools_lead_to_keys():
    names = {key.name for key in dataclasses.fields(SFTConfig)}
    assert set(config.OTHER_NAMES.values()) <= names and not names & set(config.OTHER_NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *[(f"{key}: -1.0", f"{key} is -1.0; it has to be 0 or more, and finite") for key in RATES],
        *[(f"{key}: .nan", f"{key} is nan; it has to be 0 or more, and finite") for key in RATES],
        ("learning_rate: .inf", "learning_rate is inf; it has to be 0 or more, and finite"),
        ("adam_beta1: 1.0", "adam_beta1 is 1.0; it has to be 0 or more, and below 1"),
        ("adam_beta2: -0.1", "adam_beta2 is -0.1; it has to be 0 or more, and below 1"),
        ("seed: -1", "seed is -1; it has to be between 0 and 4294967295"),
        ("data_seed: 4294967296", "data_seed is 4294967296; it has to be between 0 and 4294967295"),
        ("num_train_epochs: 0", "num_train_epochs is 0.0; it has to be more than 0, and finite"),
        ("num_train_epochs: -1", "num_train_epochs is -1.0; it has to be more than 0, and finite"),
        ("save_steps: 0", "save_steps is 0; give a number of steps, or save_strategy: no"),
    ],
)
def test_values_out_of_range(write, text, message):
    """The library fails on them with a traceback, after the rows are read, or trains with them."""
    assert refusal(write(text)) == message


def test_a_full_width_colon(write):
    config = write("learning_rate：1e-5\nmax_length: 64\n")
    assert refusal(config).endswith("; write learning_rate: with the colon ':', not '：'")
    assert "with the colon" not in refusal(write("a: [1\nsystem_prompt: 你好：再见\n"))


def test_an_extra_positional_argument(write):
    assert refusal(write(""), "stray") == "the command line: stray belongs to no key; a config file comes first"


def test_missing_keys():
    assert refusal(None) == "missing: model_name_or_path, train_data; add it to the config file or the command line"
    assert refusal(None, "--train_data", "a") == (
        "missing: model_name_or_path; add it to the config file or the command line"
    )


def test_files_that_are_no_config(tmp_path, write):
    remedy = "give a YAML config file, such as one of those in configs/"
    assert refusal("none.yaml") == f"none.yaml: no such file; {remedy}"
    assert refusal(str(tmp_path)) == f"{tmp_path}: is a folder; {remedy}"
    message = refusal(write("a: [1\n"))
    assert "not readable as YAML: while parsing a flow sequence at line" in message
    assert "<unicode string>" not in message
    twice = "not readable as YAML: en is given twice; all but the last would be lost"
    assert refusal(write("eval_data: {en: a.json, en: b.json}")).endswith(twice)
    assert refusal(write(""), "--peft", '{"r": 8, "r": 4}') == (
        'peft is not JSON (r is given twice; all but the last would be lost); write {"name": value}'
    )
    assert refusal(write("", needed="- a\n- b\n")).endswith("must contain only `key: value` lines")
    assert refusal(write("", needed="")).endswith("must contain only `key: value` lines")
    assert refusal(write("1: 2\n")).endswith("must contain only `key: value` lines")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    assert f"{binary}: not readable as YAML" in refusal(str(binary))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_length: [1, 2]", "max_length takes one value, not a list"),
        ("max_length: 1.5", "max_length: invalid int value: '1.5'"),
        ("max_length: true", "max_length: invalid int value: 'true'"),
        ("template: alpaca", "template: invalid choice: 'alpaca'"),
        ("train_on: first", "train_on: invalid choice: 'first'"),
        ("overlong: cut", "overlong: invalid choice: 'cut'"),
        ("held_out: some", "held_out is the text 'some' where a number"),
        ("bf16: yes", "bf16 is the text 'yes' where true or false is needed; write true or false"),
        ("packing: 'false'", "packing is the text 'false' where true or false is needed; write it without quotes"),
        ("learning_rate: 2e-4x", "learning_rate is the text '2e-4x' where a number is needed; write a number"),
        ("eval_strategy: step", "eval_strategy: invalid choice: 'step' (choose from 'no', 'steps', 'epoch')"),
        ("packing: 3", "packing: "),
        ("eval_data: []", "eval_data: expected at least one argument"),
    ],
)
def test_values_of_a_wrong_type_name_the_file(write, text, message):
    config = write(text)
    assert refusal(config).startswith(f"{config}: {message}")


def test_no_is_a_string_and_false_a_boolean(write):
    args = parse_config(write("save_strategy: no\nlogging_first_step: false\n"), [])
    assert args.save_strategy == "no" and args.logging_first_step is False


def test_a_wrong_value_on_the_command_line(write):
    assert refusal(write(""), "--max_length", "long") == "max_length: invalid int value: 'long'"
    assert refusal(write(""), "--max_length") == "max_length: expected one argument"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_length: 0", "max_length is 0; it has to be 1 or more"),
        ("pad_to_multiple_of: 0", "pad_to_multiple_of is 0; it has to be 1 or more"),
        ("num_proc: 0", "num_proc is 0; it has to be 1 or more"),
        ("max_new_tokens: -1", "max_new_tokens is -1; it has to be 1 or more"),
        ("num_answers: -1", "num_answers is -1; it has to be 0 or more"),
        ("num_instructions: -1", "num_instructions is -1; it has to be 0 or more"),
        ("eval_answer_share: -0.5", "eval_answer_share is -0.5; it has to be 0 or more"),
        ("early_stopping_patience: -2", "early_stopping_patience is -2; it has to be 0 or more"),
        ("held_out: -1", "held_out is -1.0; give a whole number of rows, a share below 1, or 0"),
        ("held_out: 2.5", "held_out is 2.5; give a whole number of rows, a share below 1, or 0"),
        (
            "held_out: 2\neval_data: held.json",
            "held_out and eval_data are both set; remove one of them",
        ),
        ("tokens_per_batch: -1", "tokens_per_batch is -1; it has to be 0 or more"),
        (
            "tokens_per_batch: 512",
            "tokens_per_batch is 512, less than max_length 1024; raise tokens_per_batch or lower max_length",
        ),
        (
            "tokens_per_batch: 2048\npacking: false",
            "tokens_per_batch needs packing: true, as it counts the tokens of packed rows",
        ),
        (
            "tokens_per_batch: 2048\ntrain_sampling_strategy: group_by_length",
            "tokens_per_batch does not support train_sampling_strategy group_by_length; use random",
        ),
        (
            "dataloader_drop_last: true",
            "dataloader_drop_last would skip rows; remove it, as every epoch trains on each row once",
        ),
        ("early_stopping_patience: 2", "early_stopping_patience needs load_best_model_at_end: true"),
        (
            "chat_template_kwargs: '{a'",
            "chat_template_kwargs is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            '(char 1)); write {"name": value}',
        ),
        ("chat_template_kwargs: '[1]'", "chat_template_kwargs is [1]; it has to be {name: value}"),
        *(
            (
                f"chat_template_kwargs: {{'{name}': 1}}",
                f"chat_template_kwargs: {name!r} cannot be the name of an argument; use letters and _",
            )
            for name in ("a b", "a-b", "", "if", "none", "True")
        ),
        (
            "chat_template_kwargs: {1: 2}",
            "chat_template_kwargs: '1' cannot be the name of an argument; use letters and _",
        ),
    ],
)
def test_values_that_make_no_sense(write, text, message):
    assert refusal(write(text)) == message


def test_errors_of_transformers_are_one_line(write):
    text = "load_best_model_at_end: true\neval_strategy: steps\nsave_strategy: epoch\nheld_out: 2\n"
    assert "load_best_model_at_end requires the save and eval strategy to match" in refusal(write(text))
