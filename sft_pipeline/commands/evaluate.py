"""Models side by side: the same held-out prompts and checkable instructions for each, and what differs.

    sft-pipeline evaluate smollm2-135m outputs/quickstart --data outputs/quickstart --output outputs/compared

The first model is the baseline. `--data` is a run's folder, whose held-out rows are taken, or rows of any shape.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sft_pipeline.config import parse_config
from sft_pipeline.data.messages import Message
from sft_pipeline.data.pipeline import load_conversations
from sft_pipeline.data.sources import load_source
from sft_pipeline.evaluation import tables
from sft_pipeline.evaluation.comparison import Comparison, compare_models
from sft_pipeline.evaluation.judge import Judge, JudgeResults, judge_pairs
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.model_results import EvaluatedModel, ModelResults, check_context_length, run_prompt_set
from sft_pipeline.evaluation.plots import draw_comparison
from sft_pipeline.evaluation.prompt_set import PromptSet, select_prompts
from sft_pipeline.model.loading import resolve_model
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.runs.output_dir import RUN_FILE
from sft_pipeline.runs.trained_model import load_template, load_trained
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import get_cache_dir, write_json
from sft_pipeline.utils.sanitize import format_json_line

logger = logging.getLogger(__name__)

COMPARISON_FILE = "evaluation.json"
ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class EvaluateOptions:
    """What is asked of every model. `template` and `system_prompt` are for models that are no run's."""

    data: str | None = None
    num_prompts: int = 50
    max_new_tokens: int = 128
    few_shot: int = 0
    template: str = "chat"
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_prompts", 1), ("max_new_tokens", 1), ("few_shot", 0)):
            if getattr(self, name) < least:
                raise SFTError(f"{name} is {getattr(self, name)}; it has to be {least} or more")
        if self.few_shot and self.data is None:
            raise SFTError("few_shot needs rows to take the examples from; add --data")


def evaluate_models(
    models: list[str],
    request: EvaluateOptions,
    output: Path | None,
    as_json: bool,
    console: Console,
    judge: Judge | None = None,
) -> None:
    """Ask, compare, print, and keep it in `output`."""
    check_output_folder(output)
    if judge and len(models) < 2 and not request.few_shot:
        raise SFTError("a judge compares answers of two models; name another model or give --few_shot")
    for name in models:
        # All are looked at before the first one is asked, which takes minutes.
        load_template(resolve_model(name, get_cache_dir()), request.template, request.system_prompt)
    questions = load_prompt_set(request)
    records = [one for name in models for one in run_model(name, name, questions, request)]
    comparison = compare_models(records, questions)
    if output:
        # Before the judge, which may fail.
        write_comparison(output, "evaluation", tables.format_markdown(comparison), comparison, records, questions)
    if not as_json:
        tables.print_table(tables.format_details(comparison), console)
    judged = [compare_with_judge(judge, records[0], other, questions) for other in records[1:]] if judge else []
    result = comparison.as_json() | {"judged": [asdict(one) for one in judged]}
    if output:
        write_json(output / COMPARISON_FILE, result)
    if as_json:
        print(format_json_line(result))


def build_judge(base_url: str | None, model: str | None) -> Judge | None:
    """The judge that was named, with the key from the environment; local servers need none."""
    if bool(base_url) != bool(model):
        raise SFTError("judge_base_url and judge_model go together; give both or neither")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return Judge(base_url, model, key or None) if base_url and model else None


def compare_with_judge(judge: Judge, first: ModelResults, other: ModelResults, questions: PromptSet) -> JudgeResults:
    """The held-out prompts' answers in pairs; the instructions' where there is no data."""
    prompts = questions.texts or [instruction.prompt for instruction in load_instructions()]
    pairs = (one.answers if questions.rows else one.instruction_answers for one in (first, other))
    own, others = ([answer.text for answer in column] for column in pairs)
    judged = judge_pairs(judge, prompts, own, others, names=(first.name, other.name))
    logger.info("judged by %s: %s", judge.model, judged)
    return judged


def load_prompt_set(request: EvaluateOptions) -> PromptSet:
    if request.data is None:
        return PromptSet([], [])
    return select_prompts(load_eval_conversations(request.data), request.num_prompts, request.few_shot)


def load_eval_conversations(data: str) -> list[list[Message]]:
    """A run's held-out rows, or all rows of a file, folder or hub name."""
    run = Path(data).expanduser() / RUN_FILE
    if not run.is_file():
        return load_source(data)["messages"]
    _, held_out = load_conversations(parse_config(str(run), [])[0])
    if held_out is None:
        raise SFTError(f"{data}: this run held no rows out; give a file, folder or hub name of rows")
    return held_out["messages"]


def run_model(path: str, name: str, questions: PromptSet, request: EvaluateOptions) -> Iterator[ModelResults]:
    """The model's record, and with examples in its prompts another. The model's memory is free afterwards."""
    model, template, system_prompt = load_trained(path, request.template, request.system_prompt)
    patch_loss_forward(model)
    one = EvaluatedModel(name, model, template, system_prompt)
    if request.few_shot:
        check_context_length(one, questions, request.max_new_tokens)
    yield run_prompt_set(one, questions, request.max_new_tokens)
    if request.few_shot:
        yield run_prompt_set(one, questions, request.max_new_tokens, few_shot=True)
    del model, one
    gc.collect()


def check_output_folder(output: Path | None) -> None:
    """Refuse a file, before minutes of work are lost to it."""
    if output and output.exists() and not output.is_dir():
        raise SFTError(f"output {output}: is a file; choose a folder")


def write_comparison(
    folder: Path, name: str, table: str, comparison: Comparison, records: list[ModelResults], questions: PromptSet
) -> None:
    """The table, a picture, and every answer; a missing matplotlib costs the picture alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(table, encoding="utf-8")
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in list_answers(records, questions))
    (folder / ANSWERS_FILE).write_text(lines, encoding="utf-8")
    try:
        draw_comparison(comparison, folder / f"{name}.png")
    except SFTError as error:
        logger.warning(error)


def list_answers(records: list[ModelResults], questions: PromptSet) -> Iterator[dict[str, Any]]:
    """A line a prompt: what was asked, the reference (of an instruction: its id), and each model's answer, in order."""
    for at, (row, reference) in enumerate(zip(questions.rows, questions.references)):
        answers = [{"model": one.name, **asdict(one.answers[at])} for one in records]
        yield {"prompt": row[:-1], "reference": reference, "answers": answers}
    for at, instruction in enumerate(load_instructions()):
        answers = [{"model": one.name, **asdict(one.instruction_answers[at])} for one in records]
        prompt = [{"role": "user", "content": instruction.prompt}]
        yield {"prompt": prompt, "instruction": instruction.id, "answers": answers}
