"""Results of one model: its answers, and the way to JSON and back."""

import json

import pytest
from support.model_comparison import build_conversations, make_results

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import split_answer
from sft_pipeline.evaluation.metrics.registry import METRICS
from sft_pipeline.evaluation.model_results import ModelResults
from sft_pipeline.inference.answers import answer_prompts
from sft_pipeline.model.loading import load_model, load_tokenizer


@pytest.mark.parametrize("index", range(4))
def test_answers_and_their_metrics(index, evaluated, comparison, model_folder, other_folder):
    questions, records = evaluated
    folder, name = (model_folder, "chat") if index < 2 else (other_folder, "role")
    model, template = load_model(str(folder)), build_template(name, load_tokenizer(str(folder)))
    expected = answer_prompts(
        model, template, [split_answer(row)[0] for row in build_conversations(questions, index)], 8
    )
    assert [answer.text for answer in records[index].answers] == [answer.text for answer in expected]
    metrics, texts = comparison.entries[index].metrics, [answer.text for answer in expected]
    assert metrics["stop_rate"] == sum(answer.stopped for answer in expected) / 5
    assert metrics["cap_rate"] == 1 - metrics["stop_rate"]
    columns = {"predictions": texts, "references": questions.references}
    for name in ("loop_rate", "bleu_percent"):
        assert metrics[name] == METRICS[name].compute(columns)


def test_records_survive_json(evaluated):
    for record in evaluated[1]:
        assert ModelResults.from_json(json.loads(json.dumps(record.as_json()))) == record
    cut = make_results("a", ["yes", "no"])
    cut.losses[0] = None
    assert ModelResults.from_json(json.loads(json.dumps(cut.as_json()))) == cut
