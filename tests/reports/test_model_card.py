"""Model card: results, data and licences of an exported run."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from support.exported_runs import remember_runs

from sft_pipeline.commands.export import export_model
from sft_pipeline.config import build_config_record, parse_config
from sft_pipeline.reports.model_card import build_model_card, find_licence


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """trained(key=value) is the output folder of a run on 24 rows; the same keys are the same run."""
    return remember_runs(model_folder, tmp_path_factory.mktemp("runs"))


def test_the_card_has_the_results_of_the_run(trained, tmp_path):
    folder = trained()
    export_model(str(folder), tmp_path / "exported")
    card, results = (
        ModelCard.load(tmp_path / "exported" / "README.md"),
        json.loads((folder / "results.json").read_text()),
    )
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.license is None and card.data.base_model is None and card.data.datasets is None
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert card.data.model_name == "exported"
    assert metrics["loss"] == round(results["eval_loss"]["after"], 4)
    assert metrics["stop_rate"] == results["metrics"]["stop_rate"] and "instructions_followed_rate" in metrics
    text = " ".join(card.text.split())
    assert "- `rows.jsonl`, licence: cc-by-4.0; 24 rows read, 20 trained" in text and "/rows.jsonl" not in str(card)
    assert "- trained: 20 of 20 rows" in text and "- held out: 4 of 4 rows" in text
    change = results["before_and_after"]["nll_nats_per_token"]
    cells = f"{change['before']:.3f} | {change['after']:.3f} | {change['difference']:+.3f}"
    assert f"| held-out loss, nats/token | {cells} |" in text
    assert "| `learning_rate` | 0.03 |" in text and "| `system_prompt` | You are 冬瓜. |" in text
    assert f"torch {importlib.metadata.version('torch')}" in text and "This model: not stated." in text
    assert "lora" not in text
    assert card.data.language == ["en", "zh"]


def test_the_card_repeats_the_run(trained, tmp_path, model_folder, monkeypatch):
    """Its config, with the files beside it, is the run's: without folders of this machine, and without defaults."""
    folder = trained()
    export_model(str(folder), tmp_path / "exported")
    text = (tmp_path / "exported" / "README.md").read_text()
    config = text.partition("```yaml\n")[2].partition("```")[0]
    assert str(folder.parent) not in text and "packing" not in config and "output_dir" not in config
    data = yaml.safe_load((folder / "run.yaml").read_text())["train_data"][0]
    monkeypatch.chdir(tmp_path)
    shutil.copy(data, "rows.jsonl")
    Path(model_folder.name).symlink_to(model_folder)
    Path("config.yaml").write_text(config)
    again, original = (build_config_record(parse_config(str(path))) for path in ("config.yaml", folder / "run.yaml"))
    different = {key for key in again.keys() | original.keys() if again.get(key) != original.get(key)}
    assert different <= {"output_dir", "train_data", "model_name_or_path", "logging_dir", "run_name"}


def test_revisions_tasks_and_sources_of_the_hub(trained):
    results = json.loads((trained() / "results.json").read_text())
    score = {"task": "gsm8k", "metric": "exact_match", "filter": "strict-match", "value": 0.25, "standard_error": 0.01}
    results["tasks"] = {"gsm8k exact_match, strict-match": score | {"questions": 1319, "num_fewshot": 5}}
    config = results["config"] | {"model_name_or_path": "org/base", "revision": "v2"}
    sources = [{"path": "org/rows", "split": "train[:5%]", "revision": "a1b2"}, "org/others"]
    results["sources"] = {"org/others": {"rows": 1200, "kept": 1100}}
    config |= {"train_data": sources, "eval_data": ["org/others"]}
    card = build_model_card(results | {"config": config}, "mine", "float32", None)
    assert card.data.base_model == "org/base" and card.data.datasets == ["org/rows", "org/others"]
    assert "`org/base` (revision v2) fine-tuned" in card.text
    assert "- `org/rows (split: train[:5%], revision: a1b2)`, licence: not known" in card.text
    others = "- `org/others, revision not pinned`, licence: not known"
    assert f"{others}; 1,200 rows read, 1,100 trained\n{others}\n" in card.text
    assert "| gsm8k exact_match, strict-match | 0.250 ± 0.010 of 1,319 questions |" in card.text
    assert [result.metric_value for result in card.data.eval_results if result.dataset_name == "gsm8k"] == [0.25]


def test_the_card_of_a_run_without_held_out_rows(trained, tmp_path):
    export_model(str(trained(held_out=0, max_steps=1)), tmp_path / "exported")
    card = ModelCard.load(tmp_path / "exported" / "README.md")
    assert card.data.eval_results is None and "No rows were held out, so there are no metrics." in card.text


def test_known_licenses(tmp_path):
    assert find_licence("smollm2-135m", "model") == "apache-2.0"
    assert find_licence("nobody/nothing", "model") is None
    assert find_licence(str(tmp_path), "model") is None
    for text, expected in (
        ("No front matter.", None),
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [a]\n---\n", None),
    ):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert find_licence(str(tmp_path), "model") == expected
        (tmp_path / "rows.json").write_text("[]", encoding="utf-8")
        assert find_licence(str(tmp_path / "rows.json"), "dataset") == expected
