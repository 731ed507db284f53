"""What this machine trains with, and what is missing with the command that installs it. Loads no model.

sft-pipeline doctor
sft-pipeline doctor --json | jq .findings.device.value
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

from sft_pipeline.utils.errors import SFTError, format_error
from sft_pipeline.utils.files import get_cache_dir

PACKAGE = "sft_pipeline"
EXTRAS = {"lora": ["peft"], "track": ["wandb", "trackio"], "plot": ["matplotlib"]}
MIN_DISK_GIB = 2.0  # the smallest model's weights with their optimizer take 1.5
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """value: for scripts, and shown; note: more for people; advice: what would help. Fatal: training cannot run."""

    name: str
    value: Any
    note: str = ""
    advice: str = ""
    fatal: bool = False


def run_doctor(as_json: bool, console: Console) -> None:
    """Print what was found. Raises SFTError, with the first reason, where training cannot run."""
    findings = list(list_findings())
    fatal = next((one for one in findings if one.fatal), None)
    if as_json:
        print(json.dumps({"ready": fatal is None, "findings": {one.name: asdict(one) for one in findings}}))
    else:
        _show([*findings, Finding("ready", fatal is None)], console)
    if fatal:
        raise SFTError(f"cannot train here: {fatal.name}: {fatal.value}; {fatal.advice}")


def _show(findings: list[Finding], console: Console) -> None:
    """Two columns: in a terminal broken at words, elsewhere a line a finding."""
    lines = [(one.name, "; ".join(filter(None, [_format_value(one.value), one.note, one.advice]))) for one in findings]
    if not console.is_terminal:
        for name, said in lines:
            console.print(Text(f"{name:<15} {said}"), soft_wrap=True)
        return
    table = Table(show_header=False, box=None, padding=(0, 1), pad_edge=False)
    for name, said in lines:
        table.add_row(name, Text(said))
    console.print(table)


def _format_value(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def list_findings() -> Iterator[Finding]:
    """One finding after the other; what needs torch is left out where torch does not load."""
    yield Finding("python", platform.python_version(), platform.platform())
    required = [_check_requirement(name) for name in _list_requirements()]
    yield from required
    yield from (_check_extra(extra, names) for extra, names in EXTRAS.items())
    if not any(one.fatal for one in required):
        yield from _check_hardware()
    yield from _check_disks()
    yield _check_wandb()
    yield _check_hub()


def _list_requirements() -> list[Any]:
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return [Requirement(PACKAGE)]
    return [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate({"extra": ""})]


def _check_requirement(requirement: Any) -> Finding:
    """Whether a release that was asked for is there."""
    advice = "pip install -c constraints.txt -e ."
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "not installed", advice=advice, fatal=True)
    fits = requirement.specifier.contains(version, prereleases=True)
    note = "" if fits else f"needs {requirement.specifier}"
    return Finding(requirement.name, version, note, "" if fits else advice, fatal=not fits)


def _check_extra(extra: str, names: list[str]) -> Finding:
    versions = {name: _find_version(name) for name in names}
    shown = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    missing = None in versions.values()
    return Finding(extra, shown, advice=f'pip install -c constraints.txt -e ".[{extra}]"' if missing else "")


def _find_version(name: str) -> str | None:
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
    supported, note = check_bf16(torch, device)
    yield Finding("bf16", supported, note)
    yield Finding("attention", *describe_attention(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    few = device == "cpu" and torch.get_num_threads() < (cores or 1) // 2
    advice = "raise OMP_NUM_THREADS to the cores that are yours" if few else ""
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
    """Whether `bf16: true` computes in hardware here, and what to expect of it."""
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, "" if native else "this GPU has none: fp16: true instead"
    if device == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0), "from macOS 14 on"
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # releases before 2.10 do not tell
    native = any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
    return native, "" if native else "a CPU without AMX or AVX512-BF16 is slower in bf16 than in float32"


def describe_attention(device: str) -> tuple[str, str]:
    """What attends over packed rows (model/packed_attention.py), and over all others."""
    if device == "cuda":
        missing = "" if _find_version("triton") else "; needs triton: pip install triton"
        return "flex_attention", f"packed rows, compiled in the first step{missing}; sdpa for the rest"
    if device == "cpu":
        return "blocks of rows", "packed rows in float32, no matrix of tokens x tokens; sdpa for the rest"
    return "sdpa", "packed rows one by one"


def _check_disks() -> Iterator[Finding]:
    for name, folder in {"disk_gib": Path.cwd(), "cache_disk_gib": get_cache_dir()}.items():
        there = next(one for one in [folder, *folder.parents] if one.is_dir())
        free = round(shutil.disk_usage(there).free / 2**30, 1)
        if not os.access(there, os.W_OK):
            yield Finding(name, free, f"free in {folder}", f"{there} cannot be written; go to a folder of yours", True)
        else:
            full = free < MIN_DISK_GIB
            advice = f"free some space, a run takes {MIN_DISK_GIB} GiB and more" if full else ""
            yield Finding(name, free, f"free in {folder}", advice, full)


def _check_wandb() -> Finding:
    """Whether `report_to: wandb` would be online. Looks for an account, asks neither the server nor a person."""
    mode = os.environ.get("WANDB_MODE", "online")
    if not _find_version("wandb") or mode != "online":
        return Finding("wandb", mode if _find_version("wandb") else "not installed")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        account = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:  # a key that is none
        return Finding("wandb", "offline", format_error(error), "mend WANDB_API_KEY")
    if account:
        return Finding("wandb", "online")
    return Finding("wandb", "offline", "no account here", "set WANDB_API_KEY or run `wandb login`")


def _check_hub() -> Finding:
    import httpx
    from huggingface_hub import constants, get_token

    without = "folders, files and smollm2-135m need no hub"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "offline", f"HF_HUB_OFFLINE is set; {without}")
    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except (httpx.HTTPError, OSError) as error:
        return Finding("hub", "not reachable", f"{type(error).__name__} at {constants.ENDPOINT}; {without}")
    return Finding("hub", "reachable", "logged in" if get_token() else "no account, which public models need not")
