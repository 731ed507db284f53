"""The config files of accelerate in configs/accelerate: what they start and set, and errors in such files.

Whole runs started with them: test_launch.py. Of DeepSpeed's file, only the settings are tested.
"""

import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
)
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from support.processes import call_in_process
from support.trainers import make_model, make_trainer
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from sft_pipeline.training import launch
from sft_pipeline.training.fsdp import _check_plugin

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "accelerate"
LAUNCHERS = {"cpu": "multi_gpu", "multi_gpu": "multi_gpu", "fsdp2": "multi_gpu", "deepspeed_zero3": "deepspeed"}


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    """The environment variables of the test, without those that accelerate or a test set."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "CUDA_VISIBLE_DEVICES")):
            monkeypatch.delenv(name)
    return os.environ


@pytest.fixture
def read_file(environment, monkeypatch):
    """read_file("cpu") is what `accelerate launch` makes of a file: its options, and the workers' variables."""

    def read(name: str, *options: str):
        launched = {}
        for launcher in ("simple", "multi_gpu", "deepspeed"):
            monkeypatch.setattr(
                accelerate_launch, f"{launcher}_launcher", lambda args, n=launcher: launched.update({n: args})
            )
        words = ["--config_file", str(FOLDER / f"{name}.yaml"), "--main_process_port=0", *options, "-m", "sft_pipeline"]
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(words))
        [(launcher, args)] = launched.items()
        assert launcher == LAUNCHERS[name]
        variables = prepare_multi_gpu_env(args) if launcher == "multi_gpu" else prepare_deepspeed_cmd_env(args)[1]
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        return args

    return read


def test_every_file_is_tested_and_described():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(LAUNCHERS)
    text = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    assert set(re.findall(r"configs/accelerate/(\w+)\.yaml", text)) == set(LAUNCHERS)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_command_line_overrides_the_number_of_processes(name, read_file):
    assert read_file(name).nproc_per_node == ("2" if name == "cpu" else "8")
    assert read_file(name, "--num_processes=3").nproc_per_node == "3"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"


def test_the_file_for_cpus_hides_gpus(read_file):
    read_file("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1,-1"


def test_the_fsdp_file_sets_what_this_project_supports(read_file):
    read_file("fsdp2")
    plugin = FullyShardedDataParallelPlugin()
    _check_plugin(plugin)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true" and plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.reshard_after_forward is True and plugin.auto_wrap_policy is not None
    assert plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing and type(plugin.cpu_offload).__name__ == "OffloadPolicy"


def build_trainer_config(config: dict) -> HfDeepSpeedConfig:
    """transformers' config, built without the package `deepspeed`, which its constructor requires but its methods do
    not use."""
    members = {name: value for name, value in vars(HfTrainerDeepSpeedConfig).items() if not name.startswith("__")}
    trainer_config = type("Config", (HfDeepSpeedConfig,), members)(config)
    trainer_config.mismatches, trainer_config._dtype = [], None
    return trainer_config


def test_the_deepspeed_file_takes_sizes_from_the_run(read_file, tmp_path, monkeypatch):
    read_file("deepspeed_zero3")
    plugin = DeepSpeedPlugin()
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5}
    training = TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, **sizes)
    plugin.set_mixed_precision(training.mixed_precision)  # as TrainingArguments and Trainer do it, from here on
    config = build_trainer_config(plugin.deepspeed_config)
    config.trainer_config_process(training)
    config.trainer_config_finalize(training, make_model(), 10)
    values = config.config
    assert plugin.zero3_init_flag and config.is_zero3() and config.dtype() == torch.bfloat16
    assert "auto" not in str(values.values())
    assert (values["train_micro_batch_size_per_gpu"], values["gradient_accumulation_steps"]) == (2, 3)
    assert (values["train_batch_size"], values["gradient_clipping"]) == (6, 0.5)
    assert values["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(("of_file", "of_config"), [("no", True), ("bf16", False)])
def test_bf16_of_the_config_or_of_the_file_is_autocast(of_file, of_config, environment, tmp_path, monkeypatch):
    """`accelerate launch` exports "no" also where the file says nothing."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", of_file)
    trainer = make_trainer(tmp_path, max_steps=2, bf16=of_config)
    dtypes = []
    # Of training: the check of packing and head has a reference in float32.
    trainer.model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, _, output: dtypes.append(output.dtype) if module.training else None
    )
    trainer.train()
    assert set(dtypes) == {torch.bfloat16} and trainer.model.lm_head.weight.dtype == torch.float32


# The launcher of this project, with a script in place of the training.

# It fails when all processes have written their variables: torchrun ends the others then.
SCRIPT = """
import json, os, pathlib, signal, sys, time
folder, code = pathlib.Path(sys.argv[1]), sys.argv[2]
file = folder / os.environ.get("RANK", "0")
file.write_text(json.dumps(dict(os.environ)))
file.rename(file.with_suffix(".json"))
while len(list(folder.glob("*.json"))) < int(os.environ.get("WORLD_SIZE", "1")):
    time.sleep(0.01)
exec(code)
"""


def run_launcher(words: list[str], log: Path) -> int:
    """Return the exit status of the launcher; standard output and error go to `log`."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    sys.argv = ["launch", *words]
    try:
        launch.main()
    except SystemExit as exit:
        return exit.code
    return 0


def start_launcher(folder: Path, *words: object) -> tuple[int, list[str]]:
    status = call_in_process(run_launcher, [str(word) for word in words], folder / "log")
    return status, (folder / "log").read_text().splitlines()


@pytest.mark.parametrize("options", [["--num_processes=2"], []], ids=["two processes", "one process"])
@pytest.mark.parametrize(
    ("code", "status"),
    [("sys.exit(75)", 75), ("sys.exit(2)", 2), ("pass", 0), ("os.kill(os.getpid(), signal.SIGKILL)", 137)],
)
def test_the_launcher_passes_on_status_and_settings(options, code, status, tmp_path):
    file = tmp_path / "mine.yaml"
    kind = "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}" if options else "distributed_type: 'NO'"
    file.write_text(f"{kind}\nuse_cpu: true\nmixed_precision: bf16\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["--config_file", file, *options, tmp_path / "script.py", tmp_path, code]
    actual, errors = start_launcher(tmp_path, *words)
    killed = re.fullmatch(r"sft-pipeline: process [01] was killed by SIGKILL", "".join(errors))
    assert actual == status and (bool(killed) if status == 137 else errors == []), errors
    variables = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert [rank.get("WORLD_SIZE") for rank in variables] == (["2", "2"] if options else [None])
    for rank in variables:
        assert (rank["ACCELERATE_USE_CPU"].lower(), rank["ACCELERATE_MIXED_PRECISION"]) == ("true", "bf16")
        assert rank.get("FSDP_VERSION") == ("2" if options else None)
        assert rank.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "False", "a new store for restarted workers"


BAD_FILES = {
    "distributed_type: [": "no config file of accelerate: while parsing a flow node",
    "text": "no config file of accelerate: 'str' object has no attribute 'get'",
    "distributed_type: MULTI": "no config file of accelerate: 'MULTI' is not a valid DistributedType",
    "distributed_type: FSDP\nfsdp: {}": "no config file of accelerate: The config file at .* had unknown keys",
    "distributed_type: FSDP": "You need to manually pass in `--num_processes`",
    "distributed_type: MULTI_CPU\nnum_processes: 2": "distributed_type MULTI_CPU starts one process, .*use MULTI_GPU",
    "distributed_type: DEEPSPEED\nnum_processes: 2": "DeepSpeed is not installed",
    None: "no such file; give one such as configs/accelerate/fsdp2.yaml",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_reported_in_one_line(text, environment, tmp_path, capsys, monkeypatch):
    if text and "DEEPSPEED" in text and find_spec("deepspeed"):
        pytest.skip("deepspeed is installed")
    file = tmp_path / "bad.yaml"
    if text:
        file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["launch", "--config_file", str(file), "-m", "sft_pipeline"])
    monkeypatch.setattr(launch.signal, "signal", lambda *handler: None)
    monkeypatch.setattr(launch.logging, "disable", lambda level: None)
    with pytest.raises(SystemExit) as exit:
        launch.main()
    assert exit.value.code == 2
    assert re.fullmatch(f"sft-pipeline: {file}: {BAD_FILES[text]}.*\n", capsys.readouterr().err)
