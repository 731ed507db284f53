"""Variants of one training run, evaluated on the same held-out rows: one table, one picture.

    sft-pipeline study configs/study_rows.yaml --train_data rows.json

A study's config has the keys of a run's and two of its own: `variants`, a list of keys that differ, each with a `name`
(`train: false` is the model as it is), and `few_shot`, to ask each model also with so many examples. `num_answers`
held-out rows are asked. The first variant is the baseline. In `output_dir` each variant has its config, its run and
its answers; what is there is not done again, so a study that was cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import TrainingArguments

from sft_pipeline.commands.evaluate import EvaluateOptions, run_model, write_comparison
from sft_pipeline.config import SFTArguments, build_config_record, get_output_dir, parse_keys, read_keys
from sft_pipeline.data.pipeline import load_conversations
from sft_pipeline.evaluation import tables
from sft_pipeline.evaluation.comparison import compare_models
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.model_results import ModelResults
from sft_pipeline.evaluation.prompt_set import PromptSet, select_prompts
from sft_pipeline.runs.output_dir import RESULTS_FILE
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import write_json

logger = logging.getLogger(__name__)

# The held-out rows must be one set for all.
SHARED_KEYS = ("train_data", "eval_data", "held_out", "skip_bad_rows", "output_dir", "num_answers", "max_new_tokens")


@dataclass(frozen=True)
class StudyVariant:
    """A run of the study: where it goes, and the config that `train` reads. Untrained, it is the model as it is."""

    name: str
    folder: Path
    sft: SFTArguments
    training: TrainingArguments
    trained: bool

    @property
    def config_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".yaml")

    @property
    def records_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def config(self) -> dict[str, Any]:
        return build_config_record(self.sft, self.training)


@dataclass(frozen=True)
class StudyPlan:
    """A study as it was read; nothing is written yet."""

    folder: Path
    base: SFTArguments
    few_shot: int
    variants: list[StudyVariant]


def run_study(config: str, overrides: list[str], console: Console) -> None:
    """Train and ask every variant, as far as that is not done; leaves study.md, .json, .png and answers.jsonl."""
    plan = read_plan(config, overrides)
    questions = load_study_prompts(plan)
    records: list[list[ModelResults]] = []
    for variant in plan.variants:
        logger.info("variant %s (%s of %s)", variant.name, len(records) + 1, len(plan.variants))
        train_variant(variant)
        records.append(load_or_run_variant(variant, questions, plan))
    runs = [run for variant, own in zip(plan.variants, records) for run in _read_run_costs(variant, len(own))]
    write_study(plan, questions, [record for own in records for record in own], runs, console)


def read_plan(config: str, overrides: list[str]) -> StudyPlan:
    """Raises SFTError for what is wrong with any variant, before the first one is trained."""
    keys = read_keys(Path(config))
    listed, few_shot = keys.pop("variants", None), keys.pop("few_shot", 0)
    named = isinstance(listed, list) and all(isinstance(one, dict) and one.get("name") for one in listed)
    if not named or not listed:
        raise SFTError(f"{config}: a study needs `variants`, a list of keys each with a `name`")
    if type(few_shot) is not int or few_shot < 0:
        raise SFTError(f"{config}: few_shot is {few_shot}; it has to be a whole number from 0 on")
    base, training = parse_keys(keys, config, overrides)
    folder = get_output_dir(training)
    variants = [_read_variant(one, keys, config, folder, overrides) for one in listed]
    for at, one in enumerate(variants):
        if one.folder in [other.folder for other in variants[:at]]:
            raise SFTError(f"{config}: two variants would share the folder {one.folder}; give them different names")
    return StudyPlan(folder, base, few_shot, variants)


def _read_variant(
    given: dict[str, Any], keys: dict[str, Any], config: str, folder: Path, overrides: list[str]
) -> StudyVariant:
    own = {key: value for key, value in given.items() if key not in ("name", "train")}
    name, where = str(given["name"]), f"{config}, variant {given['name']}"
    for key in own:
        if key in SHARED_KEYS:
            raise SFTError(f"{where}: {key} must be the same for all variants; set it above them")
    place = folder / re.sub(r"[^\w.-]+", "_", name)
    # The study asks the prompts itself, of all variants alike.
    fixed = [f"--output_dir={place}", "--num_answers=0", "--overwrite_output_dir=false"]
    sft, training = parse_keys({**keys, **own}, where, [*overrides, *fixed])
    return StudyVariant(name, place, sft, training, given.get("train", True) is not False)


def load_study_prompts(plan: StudyPlan) -> PromptSet:
    _, held_out = load_conversations(plan.base)
    if held_out is None or not plan.base.num_answers:
        raise SFTError("a study needs held-out rows to ask: set held_out (or eval_data) and num_answers")
    return select_prompts(held_out["messages"], plan.base.num_answers, plan.few_shot)


def train_variant(variant: StudyVariant) -> None:
    """Train in a process of its own, which gives its memory back and has a peak of its own; not if that is done."""
    if not variant.trained:
        return
    done = (variant.folder / RESULTS_FILE).is_file()
    if done and read_keys(variant.config_file) != json.loads(json.dumps(variant.config)):
        raise SFTError(f"{variant.folder}: holds a run of other settings; delete it or choose another output_dir")
    if done:
        logger.info("%s: trained before", variant.folder)
        return
    variant.folder.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(variant.config, allow_unicode=True, sort_keys=False)
    variant.config_file.write_text(text, encoding="utf-8")
    # A run that was cut off is begun again. Nothing is asked while training: the study asks afterwards.
    options = ["--overwrite_output_dir", "--num_answers", "0", "--num_instructions", "0"]
    command = [sys.executable, "-m", "sft_pipeline", "train", str(variant.config_file), *options]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise SFTError(f"variant {variant.name}: training ended with status {status}, see above; what is done is kept")


def load_or_run_variant(variant: StudyVariant, questions: PromptSet, plan: StudyPlan) -> list[ModelResults]:
    """The variant's records, read where the same was asked of the same run before."""
    request = EvaluateOptions(
        "held-out rows",
        plan.base.num_answers,
        plan.base.max_new_tokens,
        plan.few_shot,
        variant.sft.template,
        variant.sft.system_prompt,
    )
    key = _hash_inputs(variant, questions, request)
    if variant.records_file.is_file():
        kept = json.loads(variant.records_file.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return [ModelResults.from_json(one) for one in kept["records"]]
    path = str(variant.folder) if variant.trained else variant.sft.model_name_or_path
    records = list(run_model(path, variant.name, questions, request))
    variant.records_file.parent.mkdir(parents=True, exist_ok=True)
    write_json(variant.records_file, {"key": key, "records": [one.as_json() for one in records]})
    return records


def _hash_inputs(variant: StudyVariant, questions: PromptSet, request: EvaluateOptions) -> str:
    """A hash of what decides the records; of a run, the time of its results stands for the run."""
    results = variant.folder / RESULTS_FILE
    trained = results.stat().st_mtime_ns if variant.trained else variant.sft.model_name_or_path
    asked = [asdict(questions), asdict(request), [one.prompt for one in load_instructions()], variant.name, trained]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _read_run_costs(variant: StudyVariant, records: int) -> list[dict[str, Any]]:
    """What the run took, once; asked with examples, it took nothing more."""
    if not variant.trained:
        return [{}] * records
    results = json.loads((variant.folder / RESULTS_FILE).read_text(encoding="utf-8"))
    names = ("seconds", "tokens_per_second", "peak_memory_gib", "trainable_parameters", "steps")
    run = {"training_rows": results["rows"]["train"]["kept"], **{name: results[name] for name in names}}
    return [run, *[{}] * (records - 1)]


def write_study(
    plan: StudyPlan, questions: PromptSet, records: list[ModelResults], runs: list[dict[str, Any]], console: Console
) -> None:
    """One table, printed and kept, and one picture."""
    comparison = compare_models(records, questions)
    more = {
        "training rows": [f"{run['training_rows']:,}" if run else "" for run in runs],
        "trainable parameters": [f"{run['trainable_parameters']:,}" if run else "" for run in runs],
        "training, minutes": [f"{run['seconds'] / 60:.1f}" if run else "" for run in runs],
        "peak memory, GiB": [f"{run['peak_memory_gib']:.2f}" if run else "" for run in runs],
    }
    write_comparison(plan.folder, "study", tables.format_markdown(comparison, more), comparison, records, questions)
    write_json(plan.folder / "study.json", comparison.as_json() | {"runs": runs})
    notes = [f"{run['seconds'] / 60:.1f} min, {run['peak_memory_gib']:.1f} GiB" if run else "" for run in runs]
    tables.print_table(tables.format_overview(comparison, notes), console)
    console.print(
        f"kept in {plan.folder}: study.md, study.json, study.png, answers.jsonl",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
