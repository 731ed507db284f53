"""Check this machine and report what is installed and what is missing, with the command that installs it.

    sft-pipeline doctor
    sft-pipeline doctor --json | jq .findings.device.value

Loads no model. `accelerate env` prints some of the same facts, but cannot run where torch is missing, compares no
release with the required one, and takes every CPU for one with bf16; it is the place to see accelerate's own config.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_pipeline.utils.console import print_line
from sft_pipeline.utils.errors import SFTError, format_error
from sft_pipeline.utils.files import get_cache_dir

PACKAGE = "sft_pipeline"
INSTALL = "pip install -c constraints.txt -e"
EXTRAS = {
    "lora": ["peft"],
    "qlora": ["bitsandbytes"],
    "judge": ["openai"],
    "track": ["trackio"],
    "plot": ["matplotlib"],
    "harness": ["lm_eval"],
}
MIN_DISK_GIB = 2.0  # weights and optimizer state of the smallest model take 1.5
HUB_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Finding:
    """A checked fact: its value, a note that explains it, and the advice to follow. fatal: training cannot run."""

    name: str
    value: Any
    note: str = ""
    advice: str = ""
    fatal: bool = False


def run_doctor(as_json: bool, console: Console) -> None:
    """Print all findings. Raises SFTError for the first fatal one."""
    findings = list(list_findings())
    fatal = next((finding for finding in findings if finding.fatal), None)
    if as_json:
        by_name = {finding.name: asdict(finding) for finding in findings}
        print(json.dumps({"ready": fatal is None, "findings": by_name}))
    else:
        _print_findings([*findings, Finding("ready", fatal is None)], console)
    if fatal:
        raise SFTError(f"cannot train here: {fatal.name}: {fatal.value}; {fatal.advice}")


def _print_findings(findings: list[Finding], console: Console) -> None:
    """Print a two-column table that wraps at the width of a terminal; one line per finding to a file."""
    table = Table(show_header=False, box=None, padding=(0, 1), pad_edge=False)
    for finding in findings:
        text = "; ".join(filter(None, [_format_value(finding.value), finding.note, finding.advice]))
        if console.is_terminal:
            table.add_row(finding.name, Text(text))
        else:
            print_line(console, f"{finding.name:<15} {text}")
    if console.is_terminal:
        console.print(table)


def _format_value(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def list_findings() -> Iterator[Finding]:
    """Run all checks in order; those that import a requirement are left out if one is not met."""
    yield Finding("python", platform.python_version(), platform.platform())
    requirements = [_check_requirement(requirement) for requirement in _list_requirements()]
    yield from requirements
    yield from (_check_extra(extra, names) for extra, names in EXTRAS.items())
    if not any(finding.fatal for finding in requirements):
        yield from _check_hardware()
        yield _check_wandb_mode()
        yield _check_hub()
    yield from _check_disks()


def _list_requirements() -> list[Any]:
    """Return the package's requirements without those of extras; the package itself if it is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return [Requirement(PACKAGE)]
    requirements = map(Requirement, lines)
    return [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]


def _check_requirement(requirement: Any) -> Finding:
    """Compare the installed release with the required ones."""
    advice = f"{INSTALL} ."
    version = _get_version(requirement.name)
    if version is None:
        return Finding(requirement.name, "not installed", advice=advice, fatal=True)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, version, f"needs {requirement.specifier}", advice, fatal=True)
    return Finding(requirement.name, version)


def _check_extra(extra: str, names: list[str]) -> Finding:
    versions = {name: _get_version(name) for name in names}
    value = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    return Finding(extra, value, advice=f'{INSTALL} ".[{extra}]"' if None in versions.values() else "")


def _get_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_hardware() -> Iterator[Finding]:
    import psutil
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = accelerator.type if accelerator else "cpu"
    yield Finding("device", device, _describe_device(torch, device))
    yield Finding("bf16", *check_bf16(torch, device))
    yield Finding("attention", *describe_attention(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    has_few_threads = device == "cpu" and torch.get_num_threads() < (cores or 1) // 2
    advice = "raise OMP_NUM_THREADS to the number of cores that this run may use" if has_few_threads else ""
    yield Finding("threads", torch.get_num_threads(), f"of {cores} cores", advice)
    yield Finding("memory_gib", round(psutil.virtual_memory().available / 2**30, 1), "free")
    if device == "cuda":
        yield Finding("device_memory_gib", round(torch.cuda.mem_get_info()[0] / 2**30, 1), "free")


def _describe_device(torch: Any, device: str) -> str:
    if device == "cpu":
        return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    count = torch.accelerator.device_count()
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return f"{count} x {name}; train starts {count} processes"


def check_bf16(torch: Any, device: str) -> tuple[bool, str]:
    """Return whether the device computes in bf16 without emulation, and a note for one that does not."""
    if device == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return is_native, "" if is_native else "this GPU has no bf16; use fp16: true"
    if device == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0), "needs macOS 14 or newer"
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and newer
    is_native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
    return is_native, "" if is_native else "a CPU without AMX or AVX512-BF16 is slower in bf16 than in float32"


def describe_attention(device: str) -> tuple[str, str]:
    """Return the attention of packed rows on this device (model/packed_attention.py), and a note about it."""
    if device == "cuda":
        missing = "" if _get_version("triton") else "; needs triton: pip install triton"
        return "flex_attention", f"for packed rows, compiled in the first step{missing}; sdpa for padded rows"
    if device == "cpu":
        return "blocks of rows", "for packed rows in float32, without a tokens x tokens matrix; sdpa for padded rows"
    return "sdpa", "packed rows one by one"


def _check_disks() -> Iterator[Finding]:
    """Check free space and permission in the current folder and the cache folder, or their nearest existing parents."""
    for name, folder in {"disk_gib": Path.cwd(), "cache_disk_gib": get_cache_dir()}.items():
        existing = next(path for path in [folder, *folder.parents] if path.is_dir())
        free = round(shutil.disk_usage(existing).free / 2**30, 1)
        advice = ""
        if not os.access(existing, os.W_OK):
            advice = f"no permission to write to {existing}; use another folder"
        elif free < MIN_DISK_GIB:
            advice = f"free some space, a run needs {MIN_DISK_GIB} GiB or more"
        yield Finding(name, free, f"free in {folder}", advice, fatal=bool(advice))


def _check_wandb_mode() -> Finding:
    """Report whether `report_to: wandb` would be online; looks for a local account, without a request or a prompt."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return Finding("wandb_mode", mode)
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        has_account = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:  # the key is malformed
        return Finding("wandb_mode", "offline", format_error(error), "fix WANDB_API_KEY")
    if has_account:
        return Finding("wandb_mode", "online")
    return Finding("wandb_mode", "offline", "no account here", "set WANDB_API_KEY or run `wandb login`")


def _check_hub() -> Finding:
    import httpx
    from huggingface_hub import constants, get_token

    offline_note = "local folders, local files and smollm2-135m need no hub"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "offline", f"HF_HUB_OFFLINE is set; {offline_note}")
    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except (httpx.HTTPError, OSError) as error:
        return Finding("hub", "not reachable", f"{type(error).__name__} at {constants.ENDPOINT}; {offline_note}")
    return Finding("hub", "reachable", "logged in" if get_token() else "no account; public models need none")
