"""Evaluate models on the same held-out prompts and checkable instructions, and compare them.

    sft-pipeline evaluate smollm2-135m outputs/quickstart --data outputs/quickstart --output outputs/compared
    sft-pipeline evaluate smollm2-135m outputs/quickstart --tasks gsm8k,ifeval

The first model is the baseline. `--data` is a run's output folder, whose held-out rows are used, or a file, folder or
hub name of rows in any supported format. If the run has several held-out sets, the models are also compared on each.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sft_pipeline.config import parse_config
from sft_pipeline.data.messages import Conversation, add_system_prompt, split_answer
from sft_pipeline.data.pipeline import load_held_out
from sft_pipeline.data.sources import load_conversations
from sft_pipeline.data.splits import alternate, parse_sets
from sft_pipeline.data.template import Template
from sft_pipeline.evaluation import tables
from sft_pipeline.evaluation.comparison import Comparison, compare_models, compare_sets
from sft_pipeline.evaluation.harness import LoadedTasks, TaskOptions, load_tasks, run_tasks
from sft_pipeline.evaluation.judge import Judge, JudgeResults, judge_pairs
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.model_results import EvaluatedModel, ModelResults, check_context_length, run_prompt_set
from sft_pipeline.evaluation.plots import draw_comparison
from sft_pipeline.evaluation.prompt_set import PromptSet, drop_texts, find_sets, select_prompts
from sft_pipeline.evaluation.readable_messages import format_answer
from sft_pipeline.model.loading import check_revision, resolve_model, takes_revision
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.runs.output_dir import RUN_FILE
from sft_pipeline.runs.trained_model import load_template, load_trained
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import get_cache_dir, write_json
from sft_pipeline.utils.sanitize import format_json_line

logger = logging.getLogger(__name__)

COMPARISON_FILE = "evaluation.json"
ANSWERS_FILE = "answers.jsonl"
TASK_SAMPLES_FILE = "task_samples.jsonl"


@dataclass(frozen=True)
class EvaluateOptions:
    """The evaluation of every model. `template` and `system_prompt` are for models that no run saved.

    data: a run's output folder, or a file, folder or hub name of rows; None evaluates on instructions alone, or with
    tasks on these alone.
    few_shot: examples in each prompt of a second evaluation of every model; 0 leaves that out.
    tasks: of lm-evaluation-harness.
    trust_remote_code, revision: as for `load_trained`; the revision is that of the models that are on the hub.
    Raises SFTError for a number outside its range.
    """

    data: str | None = None
    num_prompts: int = 50
    max_new_tokens: int = 128
    few_shot: int = 0
    template: str = "chat"
    system_prompt: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    tasks: TaskOptions | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("num_prompts", 1), ("max_new_tokens", 1), ("few_shot", 0)):
            if getattr(self, name) < minimum:
                raise SFTError(f"{name} is {getattr(self, name)}; it has to be {minimum} or more")
        if self.few_shot and self.data is None:
            raise SFTError("few_shot needs rows to take the examples from; add --data")
        if self.few_shot and self.tasks:
            raise SFTError("few_shot is not for tasks; give num_fewshot for them, or evaluate in two commands")


def evaluate_models(
    models: list[str],
    options: EvaluateOptions,
    output: Path | None,
    as_json: bool,
    console: Console,
    judge: Judge | None = None,
) -> None:
    """Evaluate all models, print their comparison as tables (or one line of JSON), and write it to `output`.

    models: runs' output folders, model folders or hub names. judge: also judges each model's answers against those of
    the first. Raises SFTError for options that cannot work together, and for a model or rows that cannot be loaded.
    """
    check_output_folder(output)
    if judge and len(models) < 2 and not options.few_shot:
        raise SFTError("a judge compares answers of two models; name another model or give --few_shot")
    if judge and options.tasks and not options.data:
        raise SFTError("a judge compares answers to held-out prompts, not to tasks; add --data")
    # Check all names now: the evaluation of the first model takes minutes.
    paths = [resolve_model(name, get_cache_dir()) for name in models]
    if not any(map(takes_revision, paths)):
        check_revision(paths[0], options.revision)
    loaded = [
        load_template(path, options.template, options.system_prompt, options.trust_remote_code, options.revision)
        for path in paths
    ]
    prompt_set = load_prompt_set(options)
    tasks = load_tasks(options.tasks) if options.tasks else None
    for name, (template, system_prompt) in zip(models, loaded):
        check_rows(name, template, system_prompt, prompt_set)
    results = [result for name in models for result in run_model(name, name, prompt_set, options, tasks)]
    comparison, sets = compare_models(results, prompt_set), compare_sets(results, prompt_set)
    if output:
        # Before the judge, whose server may fail.
        table = tables.format_markdown(comparison)
        table += "".join(f"\n## {name}\n\n{tables.format_markdown(part)}" for name, part in sets.items())
        write_comparison(output, "evaluation", table, comparison, results, prompt_set)
    if not as_json:
        tables.print_table(tables.format_details(comparison), console)
        for name, part in sets.items():
            tables.print_table(f"\nheld-out set {name}", console)
            tables.print_table(tables.format_details(part), console)
    baseline, *candidates = results
    judged = [compare_with_judge(judge, baseline, result, prompt_set) for result in candidates] if judge else []
    content = comparison.as_json() | {"judged": [asdict(judge_results) for judge_results in judged]}
    if sets:
        content["sets"] = {name: part.as_json() for name, part in sets.items()}
    if output:
        write_json(output / COMPARISON_FILE, content)
    if as_json:
        print(format_json_line(content))


def check_rows(name: str, template: Template, system_prompt: str | None, prompt_set: PromptSet) -> None:
    """Raise SFTError naming the model and the prompt that its template cannot render, such as one with tools."""
    for row, text in zip(prompt_set.rows, prompt_set.texts):
        conversation = add_system_prompt(row, system_prompt)
        try:
            template.encode_prompt(split_answer(conversation)[0])
            template.render([conversation], "last")
        except SFTError as error:
            raise SFTError(f"{name}: the row with the prompt {reprlib.repr(text)}: {error}") from error


def build_judge(base_url: str | None, model: str | None) -> Judge | None:
    """Return the judge `model` at `base_url`, or None without both; the API key is OPENAI_API_KEY, if it is set."""
    if bool(base_url) != bool(model):
        raise SFTError("judge_base_url and judge_model go together; give both or neither")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return Judge(base_url, model, key or None) if base_url and model else None


def compare_with_judge(
    judge: Judge, baseline: ModelResults, candidate: ModelResults, prompt_set: PromptSet
) -> JudgeResults:
    """Judge two models' answers to the held-out prompts, or to the instructions if there are no held-out prompts."""
    prompts = prompt_set.texts or [instruction.prompt for instruction in load_instructions()]
    baseline_texts, candidate_texts = (
        [format_answer(answer) for answer in (result.answers if prompt_set.rows else result.instruction_answers)]
        for result in (baseline, candidate)
    )
    names = (baseline.name, candidate.name)
    judge_results = judge_pairs(judge, prompts, baseline_texts, candidate_texts, names=names)
    logger.info("judged by %s: %s", judge.model, judge_results)
    return judge_results


def load_prompt_set(options: EvaluateOptions) -> PromptSet:
    """Select held-out prompts and few-shot examples from the rows of `options.data`; an empty set without data."""
    if options.data is None:
        return PromptSet([], [])
    sets = load_eval_sets(options.data)
    rows = drop_texts(list(alternate(sets.values())), options.data)
    prompt_set = select_prompts(rows, options.num_prompts, options.few_shot)
    return replace(prompt_set, sets=find_sets(prompt_set.rows, sets))


def load_eval_sets(data: str) -> dict[str | None, list[Conversation]]:
    """Load a run's held-out sets by their names, or all rows of a file, folder or hub name, which have none."""
    run_file = Path(data).expanduser() / RUN_FILE
    if not run_file.is_file():
        return {None: load_conversations(data)}
    held_out = load_held_out(parse_config(str(run_file)))
    if held_out is None:
        raise SFTError(f"{data}: this run has no held-out rows; give a file, folder or hub name of rows")
    return parse_sets(held_out)


def run_model(
    path: str, name: str, prompt_set: PromptSet, options: EvaluateOptions, tasks: LoadedTasks | None = None
) -> Iterator[ModelResults]:
    """Load a model and yield its results, then, with `few_shot`, those with examples in its prompts.

    The model's memory is freed when the iterator is exhausted.
    """
    revision = options.revision if takes_revision(path) else None
    model, template, system_prompt = load_trained(
        path, options.template, options.system_prompt, options.trust_remote_code, revision
    )
    patch_loss_forward(model)
    evaluated = EvaluatedModel(name, model, template, system_prompt)
    if options.few_shot:
        check_context_length(evaluated, prompt_set, options.max_new_tokens)
    results = ModelResults(name, [], [], [], [])
    if options.data or not tasks:
        results = run_prompt_set(evaluated, prompt_set, options.max_new_tokens)
    if tasks:
        logger.info("%s: tasks", name)
        scores, samples = run_tasks(tasks, model, template, system_prompt)
        results = replace(results, task_scores=scores, task_samples=samples)
    yield results
    if options.few_shot:
        yield run_prompt_set(evaluated, prompt_set, options.max_new_tokens, few_shot=True)
    del model, evaluated
    gc.collect()


def check_output_folder(output: Path | None) -> None:
    """Raise SFTError if `output` is a file."""
    if output and output.exists() and not output.is_dir():
        raise SFTError(f"output {output}: is a file; choose a folder")


def write_comparison(
    folder: Path, name: str, table: str, comparison: Comparison, results: list[ModelResults], prompt_set: PromptSet
) -> None:
    """Write NAME.md (the table), NAME.png and all answers; without matplotlib log a warning instead of the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(table, encoding="utf-8")
    _write_lines(folder / ANSWERS_FILE, list_answers(results, prompt_set))
    samples = [{"model": result.name, **sample} for result in results for sample in result.task_samples]
    if samples:
        _write_lines(folder / TASK_SAMPLES_FILE, samples)
    try:
        draw_comparison(comparison, folder / f"{name}.png")
    except SFTError as error:
        logger.warning(error)


def _write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8", errors="replace")


def list_answers(results: list[ModelResults], prompt_set: PromptSet) -> Iterator[dict[str, Any]]:
    """Yield the lines of ANSWERS_FILE: a prompt, its reference (or its instruction's id), and each model's answer."""
    for index, (prompt, reference) in enumerate(zip(prompt_set.prompts, prompt_set.references)):
        answers = [
            {"model": result.name, **asdict(result.answers[index]), "calls_match": result.calls_match[index]}
            for result in results
        ]
        tools = {"tools": prompt["tools"]} if "tools" in prompt else {}
        of_set = {"set": prompt_set.sets[index]} if prompt_set.sets else {}
        yield {"prompt": prompt["messages"], **tools, "reference": reference, **of_set, "answers": answers}
    for index, instruction in enumerate(results[0].instructions):
        answers = [{"model": result.name, **asdict(result.instruction_answers[index])} for result in results]
        messages = [{"role": "user", "content": instruction.prompt}]
        yield {"prompt": messages, "instruction": instruction.id, "answers": answers}
