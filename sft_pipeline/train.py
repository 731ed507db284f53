"""A run from its config to its results, read top to bottom.

    sft-pipeline train configs/quickstart.yaml
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from sft_pipeline.config import DEFAULTS, SFTArguments
from sft_pipeline.data.collate import PaddingCollator
from sft_pipeline.data.encode import cache_dir
from sft_pipeline.data.packing import PackedCollator
from sft_pipeline.data.prepare import Prepared, prepare
from sft_pipeline.data.templates import Template, build_template, saved_chat_template, with_system_prompt
from sft_pipeline.errors import SFTError
from sft_pipeline.evaluation.answers import Answer, answer, as_dicts, before_and_after
from sft_pipeline.model.adapters import add_lora
from sft_pipeline.model.attention import use_packed_attention, why_not_packable
from sft_pipeline.model.loading import load_model, load_tokenizer, resolve, set_special_tokens
from sft_pipeline.model.supervised import supervise
from sft_pipeline.preview import show
from sft_pipeline.trainer import SupervisedTrainer, peak_memory_gib

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"  # marks an output folder as a run's, and repeats it
TEMPLATE_FILE = "sft_template.json"
BEFORE_FILE = "answers_before.json"
RESULTS_FILE = "results.json"
SHOWN = 5  # answers printed at the end; results.json has them all
PACKAGES = ("sft_pipeline", "torch", "transformers", "datasets", "accelerate", "tokenizers")


def train(sft: SFTArguments, training: TrainingArguments, console: Console) -> dict[str, Any]:
    """Fine-tune as told; leaves model, tokenizer, `run.yaml` and `results.json` in `training.output_dir`."""
    checkpoint = check_output_dir(sft, training)
    path = resolve(sft.model_name_or_path, cache_dir())
    tokenizer = load_tokenizer(path, sft.trust_remote_code)
    template = build_template(sft.template, tokenizer)
    with training.main_process_first(desc="encoding"):
        data = prepare(sft, template)
    set_seed(training.seed)
    model = load_model(path, sft.trust_remote_code)
    set_special_tokens(model, tokenizer, template.stop_token_id)
    claim_output_dir(sft, training)
    if training.process_index == 0:
        show(data.train[0], tokenizer, "first training row", console)
    trainer = build_trainer(sft, training, model, template, data)

    prompts, references = held_out_prompts(data, sft)
    before = answers_before(trainer, template, prompts, sft, Path(training.output_dir))
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    speed = trainer.tokens_per_second()
    last_eval = final_evaluation(trainer) if data.held_out else {}
    after = answer(trainer.model, template, prompts, sft.max_new_tokens)

    save(trainer, template, sft, training)
    answers = before_and_after(prompts, references, before, after)
    results = {
        "eval_loss": {"before": first_eval_loss(trainer), "after": last_eval.get("eval_loss")},
        "train_loss": outcome.training_loss,
        "steps": trainer.state.global_step,
        "tokens_per_second": round(speed, 1),
        "peak_memory_gib": peak_memory_gib(),
        "seconds": round(outcome.metrics["train_runtime"], 1),
        "stopped_share": stop_shares(answers),
        "answers": answers,
        "rows": {"train": asdict(data.train_account), "held_out": data.held_out and asdict(data.held_out_account)},
        "loss_curve": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
        "versions": {name: version(name) for name in PACKAGES},
        "seed": training.seed,
        "config": config_record(sft, training),
    }
    if trainer.is_world_process_zero():
        write_json(Path(training.output_dir) / RESULTS_FILE, results)
        print_results(results, training.output_dir, console)
    return results


def check_output_dir(sft: SFTArguments, training: TrainingArguments) -> str | None:
    """Refuse an output folder that is taken; returns the checkpoint to resume from, if that was asked for."""
    folder = Path(training.output_dir)
    if folder.exists() and not folder.is_dir():
        raise SFTError(f"output_dir {folder}: is a file; choose another folder")
    if _resumes(training):
        return checkpoint_to_resume(training.resume_from_checkpoint, folder)
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / RUN_FILE).is_file():
            raise SFTError(f"output_dir {folder}: holds files that are not a run's; choose another folder")
        if not sft.overwrite_output_dir:
            raise SFTError(
                f"output_dir {folder}: already holds a run; add --overwrite_output_dir to replace it, "
                "--resume_from_checkpoint true to go on with it, or choose another folder"
            )
    return None


def claim_output_dir(sft: SFTArguments, training: TrainingArguments) -> None:
    """Make the checked folder ours. Called when data and model are loaded: what is wrong with them costs no old run."""
    folder = Path(training.output_dir)
    with training.main_process_first(desc="output folder"):
        if training.process_index == 0:
            if (folder / RUN_FILE).is_file() and not _resumes(training):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / RUN_FILE).exists():
                text = yaml.safe_dump(config_record(sft, training), allow_unicode=True, sort_keys=False)
                (folder / RUN_FILE).write_text(text, encoding="utf-8")


def _resumes(training: TrainingArguments) -> bool:
    return training.resume_from_checkpoint not in (None, "false", "False")


def checkpoint_to_resume(asked: str, folder: Path) -> str:
    """The checkpoint's folder: the one that was named, or the run's newest."""
    if asked.lower() in ("true", "last"):
        found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if found is None:
            raise SFTError(f"output_dir {folder}: no checkpoint to resume from; leave --resume_from_checkpoint out")
        return found
    if not Path(asked).is_dir():
        raise SFTError(f"resume_from_checkpoint {asked}: no such folder; give a checkpoint-N folder, or true")
    return asked


def build_trainer(
    sft: SFTArguments, training: TrainingArguments, model: PreTrainedModel, template: Template, data: Prepared
) -> SupervisedTrainer:
    """The trainer over the prepared rows; says what it trains and how."""
    reason = supervise(model)
    if reason:
        logger.info("the head is computed at every position: %s", reason)
    collator = build_collator(sft, model, template)
    if sft.lora:
        model = add_lora(model, sft.lora_rank, sft.lora_alpha, sft.lora_target_modules)
    callbacks = [EarlyStoppingCallback(sft.early_stopping_patience)] if sft.early_stopping_patience else []
    # Rows of like length side by side need less padding; the order of held-out rows changes no figure.
    held_out = data.held_out and data.held_out.select(
        sorted(range(len(data.held_out)), key=lambda at: len(data.held_out[at]["input_ids"]))
    )
    # The rows have no other columns, and the library looks for their names in the model's own forward signature.
    training.remove_unused_columns = False
    # One process a device: the old way of one process for all devices would split a packed batch.
    training._n_gpu = min(1, training.n_gpu)
    training.dataloader_pin_memory &= torch.accelerator.is_available()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("training %s of %s parameters in %s", f"{trainable:,}", f"{model.num_parameters():,}", model.dtype)
    return SupervisedTrainer(
        model=model,
        args=training,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=held_out,
        processing_class=template.tokenizer,
        callbacks=callbacks,
    )


def build_collator(sft: SFTArguments, model: PreTrainedModel, template: Template) -> PackedCollator | PaddingCollator:
    """Packed batches where they were asked for and the model can take them; says which."""
    reason = why_not_packable(model) if sft.packing else "packing: false"
    if reason:
        logger.info("batches are padded: %s", reason)
        return PaddingCollator(template.tokenizer.pad_token_id, sft.pad_to_multiple_of)
    use_packed_attention(model)
    return PackedCollator()


def held_out_prompts(data: Prepared, sft: SFTArguments) -> tuple[list[list[dict[str, str]]], list[str]]:
    """The first `num_answers` held-out conversations without their last answer, and that answer."""
    if data.held_out_messages is None:
        return [], []
    rows = data.held_out_messages[: sft.num_answers]["messages"]
    rows = [with_system_prompt(messages, sft.system_prompt) for messages in rows]
    return [messages[:-1] for messages in rows], [messages[-1]["content"] for messages in rows]


def answers_before(
    trainer: SupervisedTrainer, template: Template, prompts: list, sft: SFTArguments, folder: Path
) -> list[Answer]:
    """The base model's answers; a resumed run reads them, for its model is no longer the base."""
    file = folder / BEFORE_FILE
    if file.is_file():
        return [Answer(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    answers = answer(trainer.model, template, prompts, sft.max_new_tokens)
    if trainer.is_world_process_zero():
        write_json(file, as_dicts(answers))
    return answers


def first_eval_loss(trainer: SupervisedTrainer) -> float | None:
    """The held-out loss at step 0."""
    return next((entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry), None)


def final_evaluation(trainer: SupervisedTrainer) -> dict[str, float]:
    """Held-out figures of the model as it will be saved; not computed again if the last evaluation was of it."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    if last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return last
    return trainer.evaluate()


def save(trainer: SupervisedTrainer, template: Template, sft: SFTArguments, training: TrainingArguments) -> None:
    """Model (or adapters), tokenizer with the trained chat template, and what `chat` needs to know."""
    template.tokenizer.chat_template = saved_chat_template(template, sft.system_prompt)
    if sft.lora and sft.lora_merge:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        record = {"template": sft.template, "system_prompt": sft.system_prompt}
        write_json(Path(training.output_dir) / TEMPLATE_FILE, record)


def stop_shares(answers: list[dict[str, Any]]) -> dict[str, float] | None:
    """The share of answers that ended by themselves, before and after."""
    if not answers:
        return None
    return {
        "before": sum(one["stopped_before"] for one in answers) / len(answers),
        "after": sum(one["stopped"] for one in answers) / len(answers),
    }


def config_record(sft: SFTArguments, training: TrainingArguments) -> dict[str, Any]:
    """Our keys, and those of TrainingArguments that were given, as one flat dictionary that `train` reads again."""
    default = TrainingArguments(output_dir=training.output_dir).to_dict()
    given = {key: value for key, value in training.to_dict().items() if value != default.get(key)}
    # With DEFAULTS, for the library's default of such a key would be read back as ours.
    for key in ("output_dir", "learning_rate", "seed", "num_train_epochs", "per_device_train_batch_size", *DEFAULTS):
        given.setdefault(key, getattr(training, key))
    # Secrets, and what would make a repeated run replace this one.
    left_out = {key for key in given if key.endswith("token")} | {"overwrite_output_dir"}
    # An empty list has no spelling on the command line, which every key goes through; it is the default anyway.
    return {key: value for key, value in {**asdict(sft), **given}.items() if key not in left_out and value != []}


def write_json(file: Path, content: Any) -> None:
    """Written aside and renamed, so that a file is whole or absent."""
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)


def print_results(results: dict[str, Any], folder: str, console: Console) -> None:
    """Answers before and after, and the figures."""
    for one in results["answers"][:SHOWN]:
        table = Table(show_header=False, box=None, padding=(0, 1), expand=True)
        table.add_column(style="bold", width=9, no_wrap=True)
        table.add_column()
        table.add_row("prompt", _plain(one["prompt"]))
        table.add_row("before", _plain(one["before"] + ("" if one["stopped_before"] else " … (cut off)")), style="dim")
        table.add_row("after", _plain(one["after"] + ("" if one["stopped"] else " … (cut off)")), style="green")
        console.print(table)
        console.print()
    loss, stopped = results["eval_loss"], results["stopped_share"]
    if loss["before"] is not None and loss["after"] is not None:
        change = loss["after"] / loss["before"] - 1
        console.print(f"held-out loss {loss['before']:.3f} -> {loss['after']:.3f} ({change:+.0%})", highlight=False)
    if stopped:
        count = len(results["answers"])
        line = f"answers that end by themselves {stopped['before']:.0%} -> {stopped['after']:.0%} (of {count})"
        console.print(line, highlight=False)
    console.print(
        f"{results['steps']} steps in {results['seconds']:.0f} s, {results['tokens_per_second']:.0f} tokens/s, "
        f"{results['peak_memory_gib']} GiB at most\nsaved in {folder}; talk to it: ./launch.sh chat {folder}",
        highlight=False,
    )


def _plain(text: str) -> Any:
    """Text of a model or a row, in which square brackets are no markup."""
    from rich.text import Text

    return Text(text)
