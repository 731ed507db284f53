"""The command `doctor`, branch by branch."""

import importlib.metadata
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from rich.console import Console

from sft_pipeline.cli import main
from sft_pipeline.commands import doctor
from sft_pipeline.commands.doctor import Finding, check_bf16, describe_attention

ROOT = Path(__file__).parents[2]


def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.list_findings()}


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_json_output_says_that_this_machine_can_train(capsys):
    main(["doctor", "--json"])
    output = json.loads(capsys.readouterr().out)
    assert output["ready"] is True
    values = {name: finding["value"] for name, finding in output["findings"].items()}
    assert values["torch"] == importlib.metadata.version("torch")
    assert values["device"] in ("cpu", "cuda", "mps") and isinstance(values["bf16"], bool)
    assert 0 < values["memory_gib"] < psutil.virtual_memory().total / 2**30
    assert values["threads"] == torch.get_num_threads()
    assert (values["wandb_mode"], values["hub"]) == ("offline", "offline")


def test_transformers_is_not_imported():
    code = "import sys; from sft_pipeline.commands import doctor; list(doctor.list_findings()); "
    code += "print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_text_output_has_one_line_per_finding(capsys):
    doctor.run_doctor(False, Console(width=200))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*findings(), "ready"]
    assert lines[-1].split() == ["ready", "yes"]


def test_lines_wrap_in_a_terminal_and_not_in_a_file(monkeypatch):
    made_up = [Finding("bf16", False, "slower than " + "x" * 30, "do [this] " * 6)]
    file, terminal = io.StringIO(), io.StringIO()
    doctor._print_findings(made_up, Console(file=file, width=40))
    assert file.getvalue() == f"bf16            no; {made_up[0].note}; {made_up[0].advice}\n"
    monkeypatch.setenv("TERM", "xterm")
    doctor._print_findings(made_up, Console(file=terminal, width=40, force_terminal=True, color_system=None))
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= 40 and "[this]" in terminal.getvalue()


def test_a_missing_package_is_fatal_and_leaves_out_what_needs_it(monkeypatch, capsys):
    get_version = importlib.metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return get_version(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert not {"device", "wandb_mode", "hub"} & {*findings()}
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--json"])
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert output.err == (
        "sft-pipeline: cannot train here: torch: not installed; pip install -c constraints.txt -e .\n"
    )
    assert json.loads(output.out)["ready"] is False


def test_an_unsupported_release_is_fatal():
    assert doctor._check_requirement(Requirement("torch<1")) == Finding(
        "torch", importlib.metadata.version("torch"), "needs <1", "pip install -c constraints.txt -e .", fatal=True
    )
    assert not doctor._check_requirement(Requirement("torch>=2")).fatal


def test_a_package_that_was_never_installed_is_fatal(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGE", "no_such_package")
    assert [doctor._check_requirement(requirement).fatal for requirement in doctor._list_requirements()] == [True]


def test_missing_extras_have_their_install_command(monkeypatch):
    assert doctor._check_extra("lora", ["peft"]).advice == ""
    monkeypatch.setattr(doctor, "_get_version", lambda name: None if name == "trackio" else "1.0")
    finding = doctor._check_extra("track", ["peft", "trackio"])
    assert (finding.value, finding.fatal) == ("peft 1.0, trackio not installed", False)
    assert finding.advice == 'pip install -c constraints.txt -e ".[track]"'


def fake_torch(capabilities: dict | None = None, cuda: bool = False, macos: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        cpu=SimpleNamespace() if capabilities is None else SimpleNamespace(get_capabilities=lambda: capabilities),
        cuda=SimpleNamespace(is_bf16_supported=lambda including_emulation: cuda),
        backends=SimpleNamespace(mps=SimpleNamespace(is_macos_or_newer=lambda major, minor: macos)),
    )


@pytest.mark.parametrize(
    ("machine", "device", "native", "note"),
    [
        (fake_torch({"avx512_bf16": True}), "cpu", True, ""),
        (fake_torch({"amx_tile": True}), "cpu", True, ""),
        (fake_torch({"architecture": "aarch64", "bf16": True}), "cpu", True, ""),
        (fake_torch({"avx2": True, "avx512_bf16": False}), "cpu", False, "slower in bf16 than in float32"),
        (fake_torch(), "cpu", False, "slower in bf16 than in float32"),
        (fake_torch(cuda=True), "cuda", True, ""),
        (fake_torch(), "cuda", False, "use fp16: true"),
        (fake_torch(macos=True), "mps", True, "macOS 14"),
        (fake_torch(), "mps", False, "macOS 14"),
    ],
)
def test_bf16(machine, device, native, note):
    supported, text = check_bf16(machine, device)
    assert supported is native and note in text


def test_attention(monkeypatch):
    assert {describe_attention(device)[0] for device in ("cpu", "mps", "cuda")} == {
        "blocks of rows",
        "sdpa",
        "flex_attention",
    }
    monkeypatch.setattr(doctor, "_get_version", lambda name: None)
    assert "pip install triton" in describe_attention("cuda")[1]


def test_few_threads_get_advice(monkeypatch):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    finding = findings()["threads"]
    assert (finding.value, finding.note) == (8, "of 64 cores") and "OMP_NUM_THREADS" in finding.advice


@pytest.mark.parametrize(
    ("free", "writable", "advice"),
    [(50, True, ""), (1, True, "free some space, a run needs 2.0 GiB"), (50, False, "no permission to write to")],
)
def test_disk(free, writable, advice, monkeypatch, tmp_path):
    monkeypatch.setenv("SFT_PIPELINE_CACHE", str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free * 2**30))
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: writable)
    for finding in doctor._check_disks():
        assert (finding.value, finding.fatal) == (free, bool(advice)) and advice in finding.advice


class Wandb(SimpleNamespace):
    Error = type("Error", (Exception,), {})

    def login(self, prompt: bool, verify: bool) -> bool:
        assert not prompt and not verify
        if isinstance(self.account, Exception):
            raise self.account
        return self.account


@pytest.mark.parametrize(
    ("account", "value", "advice"),
    [
        (True, "online", ""),
        (False, "offline", "wandb login"),
        (Wandb.Error("not forty\ncharacters"), "offline", "fix WANDB_API_KEY"),
    ],
)
def test_wandb(account, value, advice, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setitem(sys.modules, "wandb", Wandb(account=account))
    finding = doctor._check_wandb_mode()
    assert finding.value == value and advice in finding.advice


def test_the_hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx, "head", lambda url, timeout: None)
    assert doctor._check_hub().value == "reachable"

    def fails(url: str, timeout: float) -> None:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(httpx, "head", fails)
    assert (doctor._check_hub().value, doctor._check_hub().note[:12]) == ("not reachable", "ConnectError")
