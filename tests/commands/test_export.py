"""A trained folder and its export give the same greedy answers here, in transformers and on a server."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.exported_runs import remember_runs
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

from sft_pipeline.cli import main
from sft_pipeline.commands.export import export_model
from sft_pipeline.data.messages import Message, add_system_prompt
from sft_pipeline.data.template import Template
from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.runs.trained_model import load_trained
from sft_pipeline.utils.errors import SFTError

LIMIT = 8
ASKED = [
    ["Say text 2 times, 7."],
    ["Say text 3 times.\n\n", " text text.", "\n#USER: Is it in the text?\n"],
    ["Why is it so?  ", "\nanswer\n", "冬瓜"],
]
# peft 0.21 still asks transformers 5.23 under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def list_messages(texts: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """trained(key=value) is the output folder of a run on 24 rows; the same keys are the same run."""
    return remember_runs(model_folder, tmp_path_factory.mktemp("runs"))


def answer_with_engine(model: PreTrainedModel, template: Template, system: str | None) -> list[list[int]]:
    """Ids of prompt and answer for each of ASKED, as `chat` generates them, with the stop token if there is one."""
    conversations = [add_system_prompt({"messages": list_messages(texts)}, system) for texts in ASKED]
    prompts = [template.encode_prompt(conversation) for conversation in conversations]
    completions = generate(model, prompts, template.stop_token_ids, SamplingParams(max_new_tokens=LIMIT))
    ends = {"stop": [template.stop_token_id], "length": []}
    pairs = zip(prompts, completions)
    return [prompt + completion.ids + ends[completion.finish_reason] for prompt, completion in pairs]


def answer_with_pipeline(folder: Path) -> list[list[int]]:
    """The same from transformers' pipeline, whose only setting is the token limit."""
    ask = pipeline("text-generation", str(folder), device="cpu")
    outputs = [ask(list_messages(texts), max_new_tokens=LIMIT, return_tensors=True) for texts in ASKED]
    return [output[0]["generated_token_ids"] for output in outputs]


@pytest.mark.parametrize("template", ["role", "chat"])
def test_pipeline_answers_as_chat_does(trained, template):
    folder = trained(template=template)
    expected = answer_with_engine(*load_trained(str(folder)))
    # The tokenizer's own template: an answer that begins with a line end would be joined with the template's.
    answers = answer_with_pipeline(folder)
    assert answers[:2] == expected[:2] and (template == "chat" or answers == expected)
    assert any(ids[-1] == 2 for ids in answers), "no answer stopped by itself"


def test_a_base_with_sampling_settings_is_greedy_after_training(model_folder, trained, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    base.generation_config.update(
        do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.3, eos_token_id=[2, 0]
    )
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "base")
    folder = trained(model_name_or_path=str(tmp_path / "base"))
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings.pop("transformers_version")
    assert settings == {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    assert answer_with_pipeline(folder) == answer_with_engine(*load_trained(str(folder)))


@pytest.mark.parametrize("keys", [{}, {"lora": True, "lora_rank": 4}], ids=["all parameters", "LoRA"])
def test_answers_are_not_worse_after_export(trained, tmp_path, keys):
    """LLaMA-Factory 6320. The folder's, the merged export's and transformers' greedy answers have the same ids; the
    Ollama template renders the same text (tests/data/test_ollama_export.py)."""
    folder, exported = trained(**keys), tmp_path / "exported"
    export_model(str(folder), exported)
    expected = answer_with_engine(*load_trained(str(folder)))
    assert answer_with_engine(*load_trained(str(exported))) == expected == answer_with_pipeline(exported)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer.apply_chat_template(list_messages(ASKED[1]), add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=LIMIT)[0].tolist() == expected[1]
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "sft_template.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((exported / "config.json").read_text())["use_cache"] is True
    assert ("as low-rank adapters, which are merged here" in (exported / "README.md").read_text()) == bool(keys)


def test_weights_have_the_permissions_of_other_files(trained, tmp_path):
    export_model(str(folder := trained()), tmp_path / "e")
    for path in (folder, tmp_path / "e"):
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir() if file.is_file()}
        assert modes["model.safetensors"] == modes["config.json"]


def test_the_command_converts_and_prints_how_to_serve(trained, tmp_path, capsys):
    exported = tmp_path / "deep" / "exported"
    main(["export", str(trained()), str(exported), "--dtype", "bfloat16", "--license", "mit"])
    assert capsys.readouterr().out == f"exported to {exported}; serve it: transformers serve {exported}\n"
    assert {tensor.dtype for tensor in load_file(exported / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(exported).dtype == torch.bfloat16
    card = ModelCard.load(exported / "README.md")
    assert card.data.license == "mit" and "The weights are bfloat16" in card.text and "This model: mit." in card.text


@pytest.mark.parametrize(
    "prepare, error",
    [
        (lambda run, parent: (parent / "no", parent / "out"), "no: no such folder; give the output folder of a run"),
        (lambda run, parent: (parent, parent / "out"), "no results.json, which a run writes at its end"),
        (lambda run, parent: (run, parent), "already exists; choose another folder, or delete it"),
    ],
)
def test_error_messages(trained, tmp_path, prepare, error):
    folder, destination = prepare(trained(), tmp_path)
    with pytest.raises(SFTError, match=error):
        export_model(str(folder), destination)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("sft_pipeline.commands.export.build_model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model(str(trained()), tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_of_export(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["export", str(trained()), str(tmp_path / "out"), "--quantize", "4"])
    assert "export: unknown option --quantize; `export --help` lists them" in capsys.readouterr().err


# ---- a server


@pytest.mark.real
def test_a_server_answers_as_chat_does(trained):
    openai = pytest.importorskip("openai", reason="needs pip install 'transformers[serving]'")
    folder = trained()
    model, template, system = load_trained(str(folder))
    expected = answer_with_engine(model, template, system)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).parent / "transformers",
        "serve",
        folder,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen([*map(str, command), "--device", "cpu"])
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            for texts, ids in zip(ASKED, expected):
                response = client.chat.completions.create(
                    model=str(folder), messages=list_messages(texts), max_tokens=LIMIT
                )
                prompt = template.encode_prompt(add_system_prompt({"messages": list_messages(texts)}, system))
                answer = ids[len(prompt) :]
                assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (len(prompt), len(answer))
                text = template.tokenizer.decode(answer, skip_special_tokens=True)
                assert response.choices[0].message.content == text
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Until the server answers; it loads torch and the model first."""
    for _ in range(120):
        assert server.poll() is None, "the server ended"
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise TimeoutError(url)


def test_with_ollama_the_export_has_a_modelfile_with_template_and_stop_token(trained, tmp_path):
    main(["export", str(trained(template="chat", system_prompt="Be brief.")), str(tmp_path / "out"), "--ollama"])
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith('FROM .\nTEMPLATE """') and '"<|im_start|>assistant\\n"' in text
    assert 'SYSTEM """Be brief."""\nPARAMETER stop "<|im_end|>"\n' in text
