"""Model card: results, data and licences of an exported run."""

import importlib.metadata
import json

import pytest
from huggingface_hub import ModelCard
from support.exported_runs import remember_runs

from sft_pipeline.commands.export import export_model
from sft_pipeline.reports.model_card import find_licence


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
    assert "- `rows.jsonl`, licence: cc-by-4.0" in text and "/rows.jsonl" not in str(card)
    assert "- trained: 20 of 20 rows" in text and "- held out: 4 of 4 rows" in text
    change = results["before_and_after"]["nll_nats_per_token"]
    cells = f"{change['before']:.3f} | {change['after']:.3f} | {change['difference']:+.3f}"
    assert f"| held-out loss, nats/token | {cells} |" in text
    assert "| `learning_rate` | 0.03 |" in text and "| `system_prompt` | You are 冬瓜. |" in text
    assert f"torch {importlib.metadata.version('torch')}" in text and "This model: not stated." in text
    assert "lora" not in text


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
