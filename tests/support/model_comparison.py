"""Rows, a second model and results for comparisons of models, and losses from plain forward passes."""

import json
from pathlib import Path

import pytest
import torch

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import Conversation, split_answer
from sft_pipeline.evaluation.eval_loss import RowLoss
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.model_results import ModelResults
from sft_pipeline.evaluation.prompt_set import PromptSet
from sft_pipeline.inference.answers import Answer
from sft_pipeline.model.loading import load_model, load_tokenizer
from sft_pipeline.runs.output_dir import TEMPLATE_FILE

ROWS = [{"instruction": f"Say {n} to the text.", "input": "", "output": f"the answer is {n}, 冬瓜"} for n in range(8)]
SYSTEM = "You are 冬瓜."


def write_rows(file: Path) -> str:
    """Write ROWS as a data file; return its name."""
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def save_other_model(model_folder: Path, folder: Path) -> None:
    """Save the tiny model with other weights as a run with the role template and a system prompt."""
    model, tokenizer = load_model(str(model_folder)), load_tokenizer(str(model_folder))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"template": "role", "chat_template_kwargs": {}, "system_prompt": SYSTEM}
    (folder / TEMPLATE_FILE).write_text(json.dumps(settings))


def exchange(text: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


def row(text: str, reply: str, *earlier: dict) -> Conversation:
    return {"messages": [*earlier, *exchange(text, reply)]}


def make_results(name: str, texts: list[str], nll: float = 1.0, errors: tuple[int, ...] = ()) -> ModelResults:
    """A record of two rows; rows in `errors` could not be asked."""
    answers = [
        Answer(text, True, 1, "too long") if index in errors else make_answer(text) for index, text in enumerate(texts)
    ]
    losses = [RowLoss(nll, 2, 1, 4) for _ in texts]
    instruction_answers = [make_answer(instruction.good) for instruction in load_instructions()[:6]]
    return ModelResults(name, losses, answers, [None] * len(texts), instruction_answers)


def make_answer(text: str) -> Answer:
    return Answer(text, True, 1, message={"role": "assistant", "content": text})


def plain_losses(folder: Path, conversations: list[Conversation], template_name: str) -> list[tuple[float, int, int]]:
    """Summed nll, tokens and hits of each conversation's last answer, from full logits of one row at a time."""
    model, template = load_model(str(folder)), build_template(template_name, load_tokenizer(str(folder)))
    losses = []
    for [sequence], conversation in zip(template.render(conversations, "last"), conversations):
        ids = torch.tensor([token for span in sequence.spans for token in span.ids])
        start = len(template.encode_prompt(split_answer(conversation)[0]))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, start - 1 : -1].double()
        nll = -logits.log_softmax(-1).gather(1, ids[start:, None]).sum().item()
        losses.append((nll, len(ids) - start, (logits.argmax(-1) == ids[start:]).sum().item()))
    return losses


def build_conversations(questions: PromptSet, index: int) -> list[Conversation]:
    """The conversations of result `index`: plain, with examples, and both after a system prompt."""
    examples = [message for example in questions.examples for message in example] if index % 2 else []
    system = [{"role": "system", "content": SYSTEM}] if index >= 2 else []
    return [{"messages": system + examples + row["messages"]} for row in questions.rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def other_folder(model_folder, tmp_path_factory) -> Path:
    """The tiny model with other weights, saved as a run with the role template and a system prompt."""
    folder = tmp_path_factory.mktemp("other") / "run"
    save_other_model(model_folder, folder)
    return folder
