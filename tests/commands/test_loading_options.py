"""`trust_remote_code` and `revision` in every command that loads a model or its tokenizer. Nothing is downloaded."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import transformers.dynamic_module_utils
from support.command_line import refusal
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.cli import main
from sft_pipeline.model.loading import load_model
from sft_pipeline.model.peft_config import build_peft_config

# peft 0.21 still asks transformers 5.23 under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class MineConfig(LlamaConfig):
    model_type = "mine"

class Mine(LlamaForCausalLM):
    config_class = MineConfig

class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""
KEYS = {"max_steps": 1, "num_answers": 0, "num_instructions": 0}


@pytest.fixture(scope="module")
def custom(model_folder, tmp_path_factory):
    """The tiny model with classes of its own; the code that runs is kept in a cache of the test's."""
    folder = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("custom") / "model"))
    (folder / "mine.py").write_text(CODE)
    changes = {
        "config.json": {"model_type": "mine", "architectures": ["Mine"]},
        "tokenizer_config.json": {"tokenizer_class": "MineTokenizer"},
    }
    changes["config.json"]["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    changes["tokenizer_config.json"]["auto_map"] = {"AutoTokenizer": [None, "mine.MineTokenizer"]}
    for name, keys in changes.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | keys))
    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
        patch.setattr(sys, "path", [*sys.path])
        yield folder


@pytest.fixture(scope="module")
def run(custom, write_config, tmp_path_factory):
    """A run of that model; its output folder contains the code too."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder, 8, model_name_or_path=str(custom), output_dir=str(folder / "out"), **KEYS)
    main(["train", str(config), "--trust_remote_code"])
    return folder / "out"


COMMANDS = ["train", "preview", "prepare", "chat", "generate", "evaluate", "export"]


@pytest.fixture
def command_line(custom, write_config, tmp_path, monkeypatch, request):
    """command_line(name) are the arguments of a command that loads the model with its own code."""
    (tmp_path / "prompts.txt").write_text("Hi\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))

    def build(name: str, model: Path = custom) -> list[str]:
        if name in ("train", "preview", "prepare"):
            return [name, str(write_config(tmp_path, 8, model_name_or_path=str(model), **KEYS)), "--output_dir=out"]
        if name == "export":
            return [name, str(request.getfixturevalue("run")), str(tmp_path / "exported")]
        files = {"generate": [str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "answers.jsonl"), "--model"]}
        return [name, *files.get(name, []), str(model), "--max_new_tokens", "2"]

    monkeypatch.chdir(tmp_path)
    return build


@pytest.mark.usefixtures("few_instructions")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_with_its_own_code_is_loaded_if_asked_for(name, command_line, capsys):
    arguments = command_line(name)
    capsys.readouterr()
    line = refusal(capsys, *arguments)
    assert line.endswith("(it needs custom code; if you trust that code, add --trust_remote_code)")
    main([*arguments, "--trust_remote_code"])


@pytest.mark.usefixtures("few_instructions")
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "export"])
def test_the_revision_is_that_of_model_and_tokenizer(name, command_line, model_folder, monkeypatch):
    """A hub name is served from a folder, as the hub would serve this revision of it."""
    seen = []

    def serve(cls):
        load = cls.from_pretrained

        def from_pretrained(path, *args, revision=None, **options):
            seen.extend([(cls, revision)] if path == "org/model" else [])
            return load(model_folder if path == "org/model" else path, *args, **options)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    serve(AutoTokenizer)
    serve(AutoModelForCausalLM)
    main([*command_line(name, Path("org/model")), "--revision", "v1.5"])
    classes = {AutoTokenizer} if name in ("preview", "prepare") else {AutoTokenizer, AutoModelForCausalLM}
    assert set(seen) == {(cls, "v1.5") for cls in classes}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_revision_of_a_folder_is_refused(name, command_line, custom, run, capsys):
    folder = run if name == "export" else custom
    line = refusal(capsys, *command_line(name), "--revision", "v1.5")
    assert line == f"revision v1.5: {folder} is a folder, and only models on the hub have one; remove it"


def test_evaluate_takes_the_revision_for_models_on_the_hub_alone(model_folder, monkeypatch, few_instructions, capsys):
    seen = {}
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(path, *args, revision, **options):
        seen[path] = revision
        return load(model_folder, *args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: tokenizer)
    main(["evaluate", "org/model", str(model_folder), "--revision", "v1.5", "--max_new_tokens", "2"])
    assert seen == {"org/model": "v1.5", str(model_folder): "main"}


def test_adapters_keep_the_revision_of_their_base_model(model_folder, write_config, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    folder = tmp_path / "out"
    main(["train", str(write_config(tmp_path, 8, lora=True, lora_rank=2, output_dir=str(folder), **KEYS))])
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["revision"] is None and build_peft_config(SFTArguments(revision="v1.5")).revision == "v1.5"
    file.write_text(json.dumps(config | {"base_model_name_or_path": "org/model", "revision": "v1.5"}))
    seen = []
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(path, *args, revision, **options):
        seen.append((path, revision))
        return load(model_folder, *args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_model(str(folder))
    main(["export", str(folder), str(tmp_path / "exported"), "--revision", "v2"])
    assert seen == [("org/model", "v1.5"), ("org/model", "v2")]
