"""A trained model's folder has its template: the jinja text, its arguments, and the system prompt."""

import json
import shutil

import pytest
from support.conversations import build_conversation
from support.source_rows import fails
from support.templates import THINKING_TEMPLATE
from support.training_runs import run_train
from transformers import AutoTokenizer

from sft_pipeline.runs.output_dir import TEMPLATE_FILE
from sft_pipeline.runs.trained_model import load_template


@pytest.fixture(scope="module")
def trained(write_config, tmp_path_factory):
    """The folder of a run whose config names a chat template and its arguments."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "thinking.jinja").write_text(THINKING_TEMPLATE, encoding="utf-8")
    keys = {"template": "chat", "chat_template": str(folder / "thinking.jinja"), "system_prompt": "s", "max_steps": 1}
    keys |= {"chat_template_kwargs": {"mode": "of the config", "enable_thinking": False}}
    run_train(write_config(folder, rows=2, output_dir=str(folder / "out"), **keys))
    return folder / "out"


def test_the_template_of_a_run_is_that_of_its_config(trained):
    """Prompts are those of training, in this project and where only the saved chat template is read."""
    assert json.loads((trained / TEMPLATE_FILE).read_text()) == {
        "template": "chat",
        "chat_template_kwargs": {"mode": "of the config", "enable_thinking": False},
        "system_prompt": "s",
    }
    template, system_prompt = load_template(str(trained))
    prompt = (
        "<|im_start|>of the config<|im_end|>\n<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert system_prompt == "s"
    assert template.tokenizer.decode(template.encode_prompt(build_conversation(["q"], "s"))) == prompt
    tokenizer = AutoTokenizer.from_pretrained(trained)
    messages = build_conversation(["q"])["messages"]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt


@pytest.mark.parametrize("kwargs", ["", "x", [1], 3, None])
def test_template_arguments_that_no_run_wrote(trained, tmp_path, kwargs):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / TEMPLATE_FILE).read_text())
    (folder / TEMPLATE_FILE).write_text(json.dumps(settings | {"chat_template_kwargs": kwargs}))
    fails(lambda: load_template(str(folder)), f"{TEMPLATE_FILE}: not as a run writes it", "delete this file")
    del settings["chat_template_kwargs"]
    (folder / TEMPLATE_FILE).write_text(json.dumps(settings))
    fails(lambda: load_template(str(folder)), f"{TEMPLATE_FILE}: not as a run writes it")
