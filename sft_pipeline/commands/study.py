"""Train variants of one config and evaluate them on the same held-out rows: one table, one picture.

    sft-pipeline study configs/study_rows.yaml --train_data rows.json

The config of a study has the keys of a run and two more:

    variants    a list of keys that differ, each entry with a `name`; `train: false` is the untrained model
    few_shot    number of examples in each prompt of a second evaluation of every variant

Each variant is evaluated on `num_answers` held-out rows. The first one is the baseline. `output_dir` gets the config,
the run and the answers of each variant. Finished parts are not repeated, so a study that was interrupted continues
when it is run again.
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

from sft_pipeline.commands.evaluate import EvaluateOptions, run_model, write_comparison
from sft_pipeline.config import SFTConfig, build_config_record, get_output_dir, parse_keys, read_keys
from sft_pipeline.data.pipeline import load_held_out
from sft_pipeline.data.splits import alternate, parse_sets
from sft_pipeline.evaluation import tables
from sft_pipeline.evaluation.comparison import compare_models
from sft_pipeline.evaluation.metrics.instruction_following import load_instructions
from sft_pipeline.evaluation.model_results import ModelResults
from sft_pipeline.evaluation.prompt_set import PromptSet, drop_texts, select_prompts
from sft_pipeline.runs.output_dir import RESULTS_FILE
from sft_pipeline.utils.console import print_line
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import write_json

logger = logging.getLogger(__name__)

# A variant may not set these: all variants are evaluated on the same held-out rows.
SHARED_KEYS = ("train_data", "eval_data", "held_out", "skip_bad_rows", "output_dir", "num_answers", "max_new_tokens")


@dataclass(frozen=True)
class StudyVariant:
    """A variant: its output folder and its config. `trained` is False for the untrained model."""

    name: str
    folder: Path
    args: SFTConfig
    trained: bool

    @property
    def config_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".yaml")

    @property
    def records_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def config(self) -> dict[str, Any]:
        return build_config_record(self.args)


@dataclass(frozen=True)
class StudyPlan:
    """The parsed config of a study. `base` has the keys that all variants share."""

    folder: Path
    base: SFTConfig
    few_shot: int
    variants: list[StudyVariant]


def run_study(config: str, overrides: list[str], console: Console) -> None:
    """Train and evaluate every unfinished variant; write study.md, study.json, study.png and answers.jsonl."""
    plan = read_plan(config, overrides)
    prompt_set = load_study_prompts(plan)
    results: list[ModelResults] = []
    costs: list[dict[str, Any]] = []
    for number, variant in enumerate(plan.variants, start=1):
        logger.info("variant %s (%s of %s)", variant.name, number, len(plan.variants))
        train_variant(variant)
        variant_results = load_or_run_variant(variant, prompt_set, plan)
        results += variant_results
        costs += _read_training_costs(variant, len(variant_results))
    write_study(plan, prompt_set, results, costs, console)


def read_plan(config: str, overrides: list[str]) -> StudyPlan:
    """Read a study's config. Raises SFTError for an error in any variant, before one is trained."""
    keys = read_keys(Path(config))
    entries, few_shot = keys.pop("variants", None), keys.pop("few_shot", 0)
    are_named = isinstance(entries, list) and all(isinstance(entry, dict) and entry.get("name") for entry in entries)
    if not are_named or not entries:
        raise SFTError(f"{config}: a study needs `variants`, a list of keys each with a `name`")
    if type(few_shot) is not int or few_shot < 0:
        raise SFTError(f"{config}: few_shot is {few_shot}; it has to be a whole number, 0 or more")
    base = parse_keys(keys, config, overrides)
    folder = get_output_dir(base)
    variants = [_read_variant(entry, keys, config, folder, overrides) for entry in entries]
    folders = [variant.folder for variant in variants]
    for index, path in enumerate(folders):
        if path in folders[:index]:
            raise SFTError(f"{config}: two variants would share the folder {path}; give them different names")
    return StudyPlan(folder, base, few_shot, variants)


def _read_variant(
    entry: dict[str, Any], keys: dict[str, Any], config: str, folder: Path, overrides: list[str]
) -> StudyVariant:
    """Parse an entry of `variants`; `keys` are those of the study itself."""
    name, source = str(entry["name"]), f"{config}, variant {entry['name']}"
    variant_keys = {key: value for key, value in entry.items() if key not in ("name", "train")}
    for key in variant_keys:
        if key in SHARED_KEYS:
            raise SFTError(f"{source}: {key} must be the same for all variants; set it above them")
    variant_folder = folder / re.sub(r"[^\w.-]+", "_", name)
    # No answers during training: the study evaluates all variants in the same way afterwards.
    fixed = [f"--output_dir={variant_folder}", "--num_answers=0", "--overwrite_output_dir=false"]
    args = parse_keys({**keys, **variant_keys}, source, [*overrides, *fixed])
    return StudyVariant(name, variant_folder, args, entry.get("train", True) is not False)


def load_study_prompts(plan: StudyPlan) -> PromptSet:
    """Select the prompts of all variants from the study's held-out rows."""
    held_out = load_held_out(plan.base)
    if held_out is None or not plan.base.num_answers:
        raise SFTError("a study needs held-out prompts: set held_out (or eval_data) and num_answers")
    sets = parse_sets(held_out)
    rows = drop_texts(list(alternate(sets.values())), "held-out rows")
    return select_prompts(rows, plan.base.num_answers * len(sets), plan.few_shot)


def train_variant(variant: StudyVariant) -> None:
    """Train a variant that has no results yet, in a subprocess: it frees its memory and has its own memory peak."""
    if not variant.trained:
        return
    is_finished = (variant.folder / RESULTS_FILE).is_file()
    if is_finished and read_keys(variant.config_file) != json.loads(json.dumps(variant.config)):
        raise SFTError(f"{variant.folder}: holds a run with different settings; delete it or choose another output_dir")
    if is_finished:
        logger.info("%s: already trained", variant.folder)
        return
    variant.folder.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(variant.config, allow_unicode=True, sort_keys=False)
    variant.config_file.write_text(text, encoding="utf-8")
    # An unfinished run is started again.
    options = ["--overwrite_output_dir", "--num_answers", "0", "--num_instructions", "0"]
    options += ["--push_to_hub", "false", "--push_evaluation", "false"]  # the variants would share one repository
    command = [sys.executable, "-m", "sft_pipeline", "train", str(variant.config_file), *options]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise SFTError(
            f"variant {variant.name}: training failed with status {status}, see above; finished variants are kept"
        )


def load_or_run_variant(variant: StudyVariant, prompt_set: PromptSet, plan: StudyPlan) -> list[ModelResults]:
    """Return the variant's results, read from its records file if that was written for the same run and prompts."""
    options = EvaluateOptions(
        "held-out rows",
        plan.base.num_answers,
        plan.base.max_new_tokens,
        plan.few_shot,
        variant.args.template,
        variant.args.system_prompt,
        variant.args.trust_remote_code,
        variant.args.revision,
    )
    key = _hash_inputs(variant, prompt_set, options)
    if variant.records_file.is_file():
        cached = json.loads(variant.records_file.read_text(encoding="utf-8"))
        if cached["key"] == key:
            return [ModelResults.from_json(record) for record in cached["records"]]
    path = str(variant.folder) if variant.trained else str(variant.args.model_name_or_path)
    results = list(run_model(path, variant.name, prompt_set, options))
    variant.records_file.parent.mkdir(parents=True, exist_ok=True)
    write_json(variant.records_file, {"key": key, "records": [result.as_json() for result in results]})
    return results


def _hash_inputs(variant: StudyVariant, prompt_set: PromptSet, options: EvaluateOptions) -> str:
    """Hash everything that the results depend on; the modification time of its results stands for a trained model."""
    results_file = variant.folder / RESULTS_FILE
    model = results_file.stat().st_mtime_ns if variant.trained else variant.args.model_name_or_path
    instructions = [instruction.prompt for instruction in load_instructions()]
    inputs = [asdict(prompt_set), asdict(options), instructions, variant.name, model]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _read_training_costs(variant: StudyVariant, result_count: int) -> list[dict[str, Any]]:
    """Return an entry for each of the variant's results: the costs of training for the first, {} for the others."""
    if not variant.trained:
        return [{}] * result_count
    results = json.loads((variant.folder / RESULTS_FILE).read_text(encoding="utf-8"))
    names = ("seconds", "tokens_per_second", "peak_memory_gib", "trainable_parameters", "steps")
    costs = {"training_rows": results["rows"]["train"]["kept"], **{name: results[name] for name in names}}
    return [costs, *[{}] * (result_count - 1)]


def write_study(
    plan: StudyPlan,
    prompt_set: PromptSet,
    results: list[ModelResults],
    costs: list[dict[str, Any]],
    console: Console,
) -> None:
    """Write the comparison to the study's folder and print its overview. `costs` has an entry for each result."""
    comparison = compare_models(results, prompt_set)
    cost_rows = {
        "training rows": [f"{cost['training_rows']:,}" if cost else "" for cost in costs],
        "trainable parameters": [f"{cost['trainable_parameters']:,}" if cost else "" for cost in costs],
        "training, minutes": [f"{cost['seconds'] / 60:.1f}" if cost else "" for cost in costs],
        "peak memory, GiB": [f"{cost['peak_memory_gib']:.2f}" if cost else "" for cost in costs],
    }
    table = tables.format_markdown(comparison, cost_rows)
    write_comparison(plan.folder, "study", table, comparison, results, prompt_set)
    write_json(plan.folder / "study.json", comparison.as_json() | {"runs": costs})
    notes = [f"{cost['seconds'] / 60:.1f} min, {cost['peak_memory_gib']:.1f} GiB" if cost else "" for cost in costs]
    tables.print_table(tables.format_overview(comparison, notes), console)
    print_line(console, f"saved in {plan.folder}: study.md, study.json, study.png, answers.jsonl")
