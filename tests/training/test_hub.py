"""What is sent to the hub: against a double of it on this machine, every request."""

import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console
from support.fake_hub import FakeHub, serve_hub
from support.training_runs import run_train
from transformers.integrations import TrackioCallback

from sft_pipeline import SFTConfig, SFTTrainer
from sft_pipeline.config import parse_config
from sft_pipeline.runs.output_dir import RESULTS_FILE
from sft_pipeline.train import train
from sft_pipeline.training.hub import find_files_to_push
from sft_pipeline.utils.errors import SFTError

# huggingface_hub 2.4's own upload of large files, without its compiled client, which a double cannot serve.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

TRAINED, HELD_OUT = "zebra", "walrus"  # a word of every training row, and of every held-out one
MODEL = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "sft_template.json",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
}  # fmt: skip
PRIVATE = {
    *("run.yaml", "results.json", "preview.json", "report.html", "trainer_state.json"),
    *(f"evaluation/step_{step:06}.json" for step in range(3)),
}


@pytest.fixture
def hub():
    with serve_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def config(model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pushed")
    for name, word in (("rows", TRAINED), ("held", HELD_OUT)):
        rows = [{"instruction": f"Say {word} {n}.", "output": f"{word} " * n} for n in range(1, 9)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    keys = {"model_name_or_path": str(model_folder), "train_data": [str(folder / "rows.json")], "template": "role"}
    keys |= {"eval_data": [str(folder / "held.json")], "num_proc": 1, "num_answers": 2, "num_instructions": 1}
    keys |= {"max_new_tokens": 4, "max_steps": 2, "save_steps": 1, "save_strategy": "steps", "use_cpu": True}
    keys |= {"disable_tqdm": True, "report_to": "none", "push_to_hub": True, "hub_strategy": "end"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(keys | {"hub_model_id": "me/model"}))
    return folder / "tiny.yaml"


def find_words(hub: FakeHub, commit: dict[str, bytes]) -> set[str]:
    """Return the words of rows that are in any file of the commit or any body of a request."""
    sent = b" ".join([*commit.values(), *(body for _, body in hub.requests)]).decode("utf-8", errors="replace")
    return {word for word in (TRAINED, HELD_OUT) if word in sent}


def test_model_tokenizer_and_card_are_pushed_and_no_text_of_rows(hub, config, tmp_path, caplog):
    folder = tmp_path / "out"
    with caplog.at_level(logging.INFO, "sft_pipeline"):
        run_train(config, f"--output_dir={folder}")
    [commit] = hub.read_commits()
    assert commit.keys() == MODEL and not find_words(hub, commit)
    assert all((folder / name).read_bytes() == content for name, content in commit.items())
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} >= PRIVATE  # there, and not sent
    assert f"pushed {len(MODEL)} files of {folder} to {hub.address}/me/model/commit/0" in caplog.text
    created = [json.loads(body) for path, body in hub.requests if "repos/create" in path]
    assert [(repository["name"], repository["organization"]) for repository in created] == [("model", "me")]
    assert not [path for path in hub.paths if "space" in path]
    card = ModelCard(commit["README.md"].decode())
    results = json.loads((folder / RESULTS_FILE).read_text())
    assert card.data.model_name == "model" and card.data.library_name == "transformers"
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics["loss"] == round(results["eval_loss"]["after"], 4)


def test_evaluations_previews_and_logs_are_pushed_if_asked_for(hub, config, tmp_path):
    run_train(config, f"--output_dir={tmp_path / 'out'}", "--push_evaluation=true")
    [commit] = hub.read_commits()
    assert commit.keys() == MODEL | PRIVATE and find_words(hub, commit) == {TRAINED, HELD_OUT}
    assert not [name for name in commit if "checkpoint" in name or "tracker" in name]


def test_nothing_of_trackio_is_pushed(hub, config, tmp_path, monkeypatch):
    """The library's callback would sync its log, with the answers, to a Space that is public by default."""
    pytest.importorskip("trackio")
    folder = tmp_path / "out"
    trainer = SFTTrainer(args=parse_config(str(config), [f"--output_dir={folder}", "--report_to=trackio"]))
    asked = []
    monkeypatch.setattr("trackio.sync", lambda **keys: asked.append(keys))
    trainer.add_callback(TrackioCallback())  # also one that is not ours
    trainer.train()
    trainer.save_model()
    [commit] = hub.read_commits()
    assert commit.keys() == MODEL and not find_words(hub, commit)
    assert not asked and not [path for path in hub.paths if "space" in path or "bucket" in path]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_pushed_without_the_base_model(hub, config, tmp_path):
    pytest.importorskip("peft")
    trainer = SFTTrainer(args=parse_config(str(config), [f"--output_dir={tmp_path / 'out'}", "--lora=true"]))
    trainer.train()
    trainer.push_to_hub(tags="mine", license="mit")
    [commit] = hub.read_commits()
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "sft_template.json"}
    assert names <= commit.keys() <= names | MODEL - {"model.safetensors", "config.json"}
    card = ModelCard(commit["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("peft", "mit") and "mine" in card.data.tags
    assert "saved without the base model" in " ".join(card.text.split())


def test_a_failed_upload_is_one_line_and_loses_nothing(hub, config, tmp_path):
    folder, hub.fails = tmp_path / "out", ("/commit/",)
    message = (
        rf"^push_to_hub: me/model was not uploaded \(.*403.*\); the model is saved; hf upload me/model {folder} "
        r"(--include=[\w./]+ )+uploads it$"
    )
    with pytest.raises(SFTError, match=message) as raised:
        run_train(config, f"--output_dir={folder}")
    assert set(re.findall(r"--include=(\S+)", str(raised.value))) == MODEL
    assert {*MODEL, *PRIVATE} <= {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_missing_login_is_known_before_training(hub, config, tmp_path):
    hub.fails = ("/repos/create", "/api/models/")
    with pytest.raises(
        SFTError, match=r"^push_to_hub: no repository me/model \(.*403.*\); check network and login \(`hf"
    ):
        train(parse_config(str(config), [f"--output_dir={tmp_path / 'out'}"]), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_strategy_that_pushes_checkpoints_is_refused_also_if_set_later(hub, config, tmp_path):
    args = parse_config(str(config), [f"--output_dir={tmp_path / 'out'}"])
    args.set_push_to_hub("me/model", strategy="every_save")
    with pytest.raises(SFTError, match="^push_to_hub needs hub_strategy: end"):
        SFTTrainer(args=args)
    assert not hub.requests


def test_a_model_that_was_not_trained_has_no_card(hub, config, tmp_path):
    args = parse_config(str(config), [f"--output_dir={tmp_path / 'out'}", "--push_to_hub=false"])
    trainer = SFTTrainer(args=args)
    for call in (trainer.push_to_hub, trainer.save_results):
        with pytest.raises(SFTError, match=r"^results: nothing has been trained; call train\(\) first$"):
            call()
    assert not hub.read_commits()


def test_files_of_checkpoints_are_not_found(tmp_path):
    for name in ("model.safetensors", "checkpoint-2/model.safetensors", "vocab.json", "rows.json", "modeling_x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = find_files_to_push(tmp_path, ["vocab.json"], with_evaluation=True)
    assert found == ["model.safetensors", "modeling_x.py", "vocab.json"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"push_evaluation": True}, "^push_evaluation needs push_to_hub: true"),
        ({"trackio_static_space_id": "me/log"}, "^trackio_static_space_id needs trackio_space_id"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(keys, message, tmp_path):
    with pytest.raises(SFTError, match=message):
        SFTConfig(str(tmp_path), use_cpu=True, **keys)
