"""The evaluate.Metric objects give the pure functions' metrics, together, in batches, and without a network."""

import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest

from sft_pipeline.evaluation.metrics import hf_metrics, registry
from sft_pipeline.evaluation.metrics.instruction_following import instruction_figures, load_instructions
from sft_pipeline.utils.errors import SFTError

ANSWERS = ["我喜欢看书。", "The sun is a star. The sun is a star.", ""]
REFERENCES = ["我很喜欢看书。", "The sun is a star.", "No."]
PROMPTS = ["你喜欢什么？", "What is the sun?", "Really?"]
REASONS = ["stop", "length", "stop"]
LOSS = {"nll_nats": [3.5, 2.0, 1.0], "tokens": [4, 2, 1], "correct": [2, 1, 0], "utf8_bytes": [18, 37, 3]}
COLUMNS = {"references": REFERENCES, "prompts": PROMPTS, "finish_reasons": REASONS, **LOSS}
EXPECTED = {
    **registry.answer_figures(ANSWERS, prompts=PROMPTS, references=REFERENCES, finish_reasons=REASONS),
    **registry.loss_figures(*LOSS.values()),
}


@pytest.fixture
def combined(tmp_path):
    kinds = ("HeldOutLoss", "Stopping", "Repetition", "PromptEcho", "AnswerLength", "Overlap")
    return evaluate.combine([getattr(hf_metrics, kind)(cache_dir=str(tmp_path)) for kind in kinds])


def test_combined_they_give_all_figures(combined):
    assert combined.compute(predictions=ANSWERS, **COLUMNS) == pytest.approx(EXPECTED)


def test_batches_add_up_to_the_same(combined):
    for part in (slice(0, 1), slice(1, 3)):
        combined.add_batch(predictions=ANSWERS[part], **{name: column[part] for name, column in COLUMNS.items()})
    assert combined.compute() == pytest.approx(EXPECTED)


def test_a_metric_alone_names_and_describes_itself(tmp_path):
    metric = hf_metrics.PromptEcho(cache_dir=str(tmp_path))
    assert metric.name == "prompt_echo"
    assert "copied into the answer" in metric.description and "predictions, prompts" in metric.inputs_description
    assert metric.compute(predictions=["a"], prompts=["a b"]) == {"prompt_echo_share": 0.5}


def test_instructions_followed(tmp_path):
    some = load_instructions()[::5]
    answers = [i.good if n % 2 else i.bad for n, i in enumerate(some)]
    ids = [i.id for i in some]
    metric = hf_metrics.InstructionsFollowed(cache_dir=str(tmp_path))
    assert metric.compute(predictions=answers, instruction_ids=ids) == instruction_figures(answers, ids)
    with pytest.raises(SFTError, match="unknown instruction id 'x'"):
        metric.compute(predictions=["a"], instruction_ids=["x"])


def test_numpy_random_state_is_left_alone(combined):
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    combined.compute(predictions=ANSWERS, **COLUMNS)
    assert (np.random.get_state()[1] == before).all()


def test_no_network_is_touched(tmp_path):
    """A fresh process, offline, where opening a socket is an error and every warning is one too."""
    script = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('the network was used')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import evaluate\n"
        "from sft_pipeline.evaluation.metrics.hf_metrics import Overlap, Repetition\n"
        "both = evaluate.combine([Repetition(), Overlap()])\n"
        "print(both.compute(predictions=['你好'], references=['你好'])['rouge_l_f1'])\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (run.returncode, run.stdout) == (0, "1.0\n"), run.stderr
