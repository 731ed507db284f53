"""`SFTTrainer`: a run from rows and a model, for Python and for the command line.

    trainer = SFTTrainer("Qwen/Qwen3-0.6B", SFTConfig("outputs/run"), train_dataset=rows, eval_dataset=held_out)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()

It encodes the rows, prepares the model and answers held-out prompts at each evaluation; how it trains is in trainer.py.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import HubStrategy, IntervalStrategy, TrainOutput

from sft_pipeline.config import SFTConfig, build_config_record, get_output_dir
from sft_pipeline.data.batch_sampler import count_row_tokens
from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.messages import Conversation
from sft_pipeline.data.packing import PackingCollator, describe_savings
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.data.pipeline import EvalSource, PreparedData, prepare_data, prepare_held_out, prepare_stream
from sft_pipeline.data.preview import build_preview
from sft_pipeline.data.shards import map_shards
from sft_pipeline.data.sources import Source, describe_unread_names
from sft_pipeline.data.splits import parse_sets
from sft_pipeline.data.template import Template
from sft_pipeline.data.tokenizer_export import build_saved_tokenizer
from sft_pipeline.model.loading import (
    check_revision,
    load_tokenizer,
    resolve_model,
)
from sft_pipeline.model.lora import check_saved_adapters
from sft_pipeline.model.new_tokens import add_tokens
from sft_pipeline.model.quantization import dequantize_base, is_quantized, save_quantization
from sft_pipeline.runs.checkpoints import needs_evaluation
from sft_pipeline.runs.output_dir import (
    PREVIEW_FILE,
    RESULTS_FILE,
    check_output_dir,
    copy_evaluations,
    create_output_dir,
    is_resuming,
)
from sft_pipeline.runs.trained_model import save_template_settings
from sft_pipeline.training.devices import check_devices
from sft_pipeline.training.evaluation_callback import EvaluationCallback
from sft_pipeline.training.final_results import build_results, count_rows
from sft_pipeline.training.final_tasks import evaluate_tasks, load_eval_tasks
from sft_pipeline.training.held_out_sets import check_held_out_sets
from sft_pipeline.training.hub import CARD_FILE, build_card, convert_hub_errors, upload_model
from sft_pipeline.training.memory import set_malloc_options
from sft_pipeline.training.model_setup import check_quantization, choose_token_budget, set_up_model
from sft_pipeline.training.optimizers import check_optimizer
from sft_pipeline.training.parallel_sizes import check_parallel_sizes
from sft_pipeline.training.precision import describe_precision, take_model_dtype
from sft_pipeline.training.trackers import drop_missing_trackers, guard_trackers, start_trackers
from sft_pipeline.training.trainer import SupervisedTrainer
from sft_pipeline.utils.distributed import main_process_first
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.files import get_cache_dir, write_json
from sft_pipeline.utils.time_account import TimeAccount

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

DDP_TIMEOUT = 1800  # seconds, the default
SAMPLE_ROWS = 1000  # about as many rows are packed to measure what packing saves


class SFTTrainer(SupervisedTrainer):
    """Fine-tune a causal language model on conversations.

    model: a hub name, a folder, or a model, which is changed in place. Default: `model_name_or_path` of `args`.
    args: a SFTConfig, or TrainingArguments, which are completed with our defaults.
    train_dataset, eval_dataset: rows of any format of docs/data.md as a list, a `Dataset` or the name of a file, folder
        or hub dataset; or encoded rows, with `input_ids` and shifted `labels`. eval_dataset may be a mapping of names
        to them: each of these sets has its own metrics. Default: `train_data`, `eval_data` and `held_out` of `args`.
    processing_class: the tokenizer; by default the model's.
    template: a name, or a Template with its tokenizer; by default `template` of `args`.
    peft_config: the adapters to train, in place of the keys `lora*` and `peft` of `args`.
    callbacks: as for `transformers.Trainer`.

    Attributes: `data`, the encoded rows with their statistics; `template`; `evaluation`, with the results of all
    evaluations; `config_record`, the config that is written to run.yaml. Raises SFTError for rows, a model or settings
    that cannot be trained.
    """

    args: SFTConfig

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Source | None = None,
        eval_dataset: EvalSource | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        template: str | Template | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        # A copy, as what follows from model and rows is set in it: the caller's may serve for another trainer.
        args = copy.copy(SFTConfig.from_training_arguments(args or SFTConfig()))
        check_held_out_sets(args, eval_dataset)
        check_devices(args)
        check_optimizer(args)
        check_parallel_sizes(args, model)
        tasks = load_eval_tasks(args)  # an unknown name ends the run here
        source = os.fspath(model) if isinstance(model, os.PathLike) else model or args.model_name_or_path
        if source is None:
            raise SFTError("model: missing; give a model, a folder or a hub name")
        args.model_name_or_path = source if isinstance(source, str) else source.name_or_path
        path = str(resolve_model(source, get_cache_dir()) if isinstance(source, str) else source.name_or_path)
        if isinstance(source, str):
            check_revision(path, args.revision)
        else:
            take_model_dtype(args, source)
        check_quantization(source, path, args, peft_config)
        if not isinstance(template, Template):
            if processing_class is None and not path:
                raise SFTError("processing_class: missing; the model does not name the folder of its tokenizer")
            tokenizer = processing_class or load_tokenizer(path, args.trust_remote_code, args.revision)
            kwargs: Any = args.chat_template_kwargs
            template = build_template(template or args.template, tokenizer, args.chat_template, kwargs)
        elif processing_class is not None:
            raise SFTError("processing_class: the Template given as template has its tokenizer; leave it out")
        add_tokens(template.tokenizer, args.add_tokens)
        self.template, args.template = template, template.name
        self.config_record = build_config_record(args)  # before the steps below change `args`
        drop_missing_trackers(args)

        times = TimeAccount()
        self.data = load_training_data(args, template, train_dataset, eval_dataset, times)
        set_evaluation_arguments(args, has_held_out_rows=self.data.held_out is not None)
        set_seed(args.seed)
        with times.measure("loading the model"):
            model, collator = set_up_model(source, path, args, template, self.data, peft_config)
        set_training_arguments(args, collator)
        self.trainable_parameters = count_trainable_parameters(model)
        parameters = f"{self.trainable_parameters:,} of {model.num_parameters():,} parameters"
        logger.info("training %s in %s", parameters, describe_precision(model, args))
        patience = args.early_stopping_patience
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=self.data.train,
            eval_dataset=self.data.held_out and sort_by_length(self.data.held_out),
            processing_class=build_saved_tokenizer(template, args.system_prompt, args.trust_remote_code),
            callbacks=[*([EarlyStoppingCallback(patience)] if patience else []), *callbacks],
            tokens_per_batch=args.tokens_per_batch or 0,
            times=times,
            stream=self.data.stream,
        )
        if args.lora_merge and self.is_fsdp_enabled:
            raise SFTError("lora_merge: adapters cannot be merged into weights sharded by fsdp; turn one of them off")
        guard_trackers(self)
        self.evaluation = EvaluationCallback(
            self,
            template,
            self._parse_held_out_sets(),
            system_prompt=args.system_prompt,
            num_answers=args.num_answers,
            num_instructions=args.num_instructions,
            max_new_tokens=args.max_new_tokens,
            eval_answer_share=args.eval_answer_share,
        )
        self.add_callback(self.evaluation)
        self._tasks = tasks
        self.task_scores: dict[str, dict[str, Any]] = {}  # of `eval_tasks`
        self.train_output: TrainOutput | None = None  # of the last call of `train`
        self._has_output_dir = False
        log_devices(self)
        if isinstance(collator, PackingCollator):
            log_packing(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train and evaluate the final model, with the trackers of `report_to`.

        With `eval_tasks` the model and results.json are saved here, and the model is then asked the tasks.

        resume_from_checkpoint: a checkpoint folder, True (the newest one) or "auto" (the newest one if there is one);
        by default the key of `args`. The output folder is created here, and gets the files that runs/output_dir.py
        lists. Raises SFTError for a folder that holds something else, RunPreempted after SIGTERM.
        """
        if resume_from_checkpoint is not None:
            self.args.resume_from_checkpoint = str(resume_from_checkpoint)
        checkpoint = self._create_output_dir()
        if checkpoint:
            logger.info("resuming from %s", checkpoint)
            self.args.eval_on_start = needs_evaluation(checkpoint, self.args)
        with start_trackers(self, checkpoint, describe_data(self.data)):
            with self.times.measure("training"):
                self.train_output = output = super().train(checkpoint, *args, **kwargs)
            self._take_stream_account()
            if self.data.held_out is not None:
                self._evaluate_final_model()
            if self._tasks:
                # First, so that nothing that happens in a task loses the model or its results.
                with self.times.measure("saving"):
                    self.save_model(push=False)
                    self.save_results()
                with self.times.measure("tasks"):
                    self.task_scores = evaluate_tasks(self, self._tasks)
                self.save_results()
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the held-out loss and answer the held-out prompts; the answers are stored in the output folder."""
        if not self._has_output_dir:
            self._create_output_dir()
        count = len(self.evaluation.evaluations)
        with self.times.measure("held-out loss"):
            metrics = super().evaluate(*args, **kwargs)
        for results in self.evaluation.evaluations[count:]:
            self.times.move(results.seconds, "held-out loss", "answering")
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False, push: bool = True) -> None:
        """Save model and tokenizer, with the template that `chat`, `generate` and `evaluate` use.

        With `lora_merge` the adapters are merged first, except in checkpoints. With `push_to_hub` a model that is saved
        in the output folder is then uploaded, unless `push` is off.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        if self.args.lora_merge and not _internal_call and hasattr(model, "merge_and_unload"):
            if is_quantized(model):
                model = dequantize_base(model, getattr(torch, self.args.dtype))
            self.model = model.merge_and_unload()
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and output_dir is not None:
            save_quantization(self.accelerator.unwrap_model(self.model), Path(output_dir))
            save_template_settings(Path(output_dir), self.template, self.args.system_prompt)
        if self.args.push_to_hub and push and not _internal_call and output_dir in (None, self.args.output_dir):
            upload_model(self, "Model save")

    def save_results(self) -> dict[str, Any]:
        """Write results.json to the output folder, from process 0; return its content. Raises SFTError before train."""
        results = build_results(self)
        if self.is_world_process_zero():
            write_json(get_output_dir(self.args) / RESULTS_FILE, results)
        return results

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository `hub_model_id`: before training, so that a missing login is known by then."""
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            raise SFTError("push_to_hub needs hub_strategy: end")  # set after `args` was created
        name = self.args.hub_model_id or get_output_dir(self.args).absolute().name
        with convert_hub_errors(
            f"no repository {name}", "check network and login (`hf auth login`), or turn push_to_hub off"
        ):
            super().init_hf_repo(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and upload it, with tokenizer and card; with `push_evaluation` also the evaluations.

        As in the library, except for the files that are uploaded: training/hub.py lists them. kwargs: of
        `create_model_card`.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(push=False)
        return upload_model(self, commit_message, blocking, token, revision, **kwargs)

    def create_model_card(
        self,
        language: Any = None,
        license: str | None = None,
        tags: Any = None,
        model_name: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write README.md of the output folder, from the results of the run; called by process 0.

        tags: added to ours. Raises SFTError for the other options of the library, and before `train`.
        """
        if args or kwargs:
            raise SFTError(
                f"create_model_card: {', '.join(kwargs) or 'options'} not supported; edit {CARD_FILE} instead"
            )
        card = build_card(self, model_name, license)
        card.data["language"] = language
        card.data["tags"] += [tags] if isinstance(tags, str) else tags or []
        card.save(get_output_dir(self.args) / CARD_FILE)

    def _parse_held_out_sets(self) -> list[Conversation] | dict[str, list[Conversation]]:
        """Return the held-out conversations to answer: those of each set, if the sets have names."""
        rows = self.data.held_out_conversations
        sets = {} if rows is None else parse_sets(rows)  # encoded rows have no conversations
        return {name: sets.get(name, []) for name in self.data.held_out_sets} or sets.get(None, [])

    def _create_output_dir(self) -> str | None:
        """Create the output folder of this run, once; return the checkpoint to resume from, or None."""
        if self._has_output_dir and not is_resuming(self.args):
            return None
        checkpoint = check_output_dir(self.args)
        if checkpoint:
            check_saved_adapters(self.accelerator.unwrap_model(self.model), Path(checkpoint))
        self.accelerator.wait_for_everyone()  # the others check the folder as this process has found it
        create_output_dir(self.args, checkpoint, self.config_record)
        copy_evaluations(checkpoint, self.args)
        if self.is_world_process_zero():
            preview = build_preview(self.data.train, self.template.tokenizer)
            write_json(get_output_dir(self.args) / PREVIEW_FILE, preview)
        self._has_output_dir = True
        return checkpoint

    def _take_stream_account(self) -> None:
        """Replace the statistics of the first rows of a stream by those of all rows that were read."""
        if self.stream is None:
            return
        account = self.stream_account
        self.data = replace(
            self.data,
            train_stats=account.compute_stats(),
            sources=account.sources,
            unread={source: dict(counts.most_common()) for source, counts in account.unread.items()},
        )
        logger.info("streamed training rows: %s", self.data.train_stats)
        for source, names in account.unread.items():
            if names:
                logger.info("%s: not read: %s", source, describe_unread_names(names))

    def _evaluate_final_model(self) -> None:
        """Evaluate the model that will be saved, unless the last evaluation did so and asked every question.

        `load_best_model_at_end` has replaced the model since the last evaluation.
        """
        step = self.state.global_step
        last_step = next((entry["step"] for entry in reversed(self.state.log_history) if "eval_loss" in entry), None)
        if last_step != step or not self.evaluation.is_complete(step) or self.args.load_best_model_at_end:
            self.evaluate()


def load_training_data(
    args: SFTConfig,
    template: Template,
    train_rows: Source | None,
    eval_rows: EvalSource | None,
    times: TimeAccount,
) -> PreparedData:
    """Map the shards of `prepared_data`, or encode the rows.

    On each machine the first process encodes; the others then read its cache. Of a stream all encode the first rows.
    """
    if args.prepared_data and train_rows is None and eval_rows is None:
        return map_shards(args, template)
    if not args.train_data and train_rows is None:
        raise SFTError("train_dataset: missing; give rows, or the key train_data")
    if args.streaming:
        with main_process_first(args):
            held_out = prepare_held_out(args, template, eval_rows, times)
        seed = args.seed if args.data_seed is None else args.data_seed
        with times.measure("reading rows"):
            shuffle = args.train_sampling_strategy == "random"
            return prepare_stream(args, template, train_rows, held_out, seed, shuffle)
    with main_process_first(args):
        return prepare_data(args, template, train_rows, eval_rows, times)


def set_evaluation_arguments(args: SFTConfig, has_held_out_rows: bool) -> None:
    """Turn evaluation off, also at step 0, if there are no held-out rows.

    Raises SFTError for keys that need them.
    """
    if has_held_out_rows:
        if args.streaming and args.eval_strategy == IntervalStrategy.EPOCH:
            logger.info("eval_strategy: epoch evaluates a stream before and after training; set steps for more")
        return
    if args.load_best_model_at_end:
        raise SFTError("load_best_model_at_end needs held-out rows: set held_out, eval_data or eval_dataset")
    args.eval_on_start, args.eval_strategy = False, IntervalStrategy.NO


def set_training_arguments(args: SFTConfig, collator: PackingCollator | PaddingCollator) -> None:
    """Set in place the arguments that follow from our model and data; on a CPU also configure malloc."""
    if args.tokens_per_batch is None:
        args.tokens_per_batch = choose_token_budget(args) if isinstance(collator, PackingCollator) else 0
    # The layers are compiled: Trainer must not compile the model around them.
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    # All columns are inputs of the patched forward; the library would drop those not in the signature of the original.
    args.remove_unused_columns = False
    # Every forward pass uses every trained parameter (freeze_unreached), also for a batch without targets, so DDP need
    # not search for unused ones.
    args.ddp_find_unused_parameters = bool(args.ddp_find_unused_parameters)
    args.dataloader_pin_memory &= torch.accelerator.is_available()
    if args.trackio_static_space_id is None:
        # The library publishes trackio's log, with prompts and answers, as a Space when a model is pushed.
        args.trackio_static_space_id = False
    if args.device.type == "cpu":
        set_malloc_options()


def sort_by_length(dataset: Dataset) -> Dataset:
    """Sort rows by number of tokens, so that evaluation batches need less padding; metrics stay the same."""
    return dataset.select(np.argsort(count_row_tokens(dataset), kind="stable"))


def count_trainable_parameters(model: PreTrainedModel) -> int:
    """Count parameters that require gradients; `ds_numel` is the full size of one sharded by ZeRO-3."""
    return sum(getattr(w, "ds_numel", w.numel()) for w in model.parameters() if w.requires_grad)


def log_devices(trainer: SFTTrainer) -> None:
    """Log the number of processes, if more than one, and whether the model is replicated or sharded."""
    args = trainer.args
    if args.world_size > 1:
        layout = "the whole model on each"
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            layout = f"the model sharded across them ({'FSDP2' if trainer.is_fsdp_enabled else 'ZeRO-3'})"
        logger.info("%s processes (%s), %s", args.world_size, args.distributed_state.backend, layout)
        if args.use_cpu and args.ddp_timeout != DDP_TIMEOUT:
            logger.warning("ddp_timeout: not used by transformers with use_cpu, collectives wait %s s", DDP_TIMEOUT)


def log_packing(trainer: SFTTrainer) -> None:
    """Log what packing saves, measured on about SAMPLE_ROWS rows."""
    batches = trainer.build_batch_sampler()
    sample: list[list[int]] = []
    for rows in chain.from_iterable(map(batches.split_step, batches.split_epoch(0))):
        sample.append(rows)
        if sum(map(len, sample)) >= SAMPLE_ROWS:
            break
    logger.info("%s", describe_savings(trainer.train_dataset, sample, trainer.args.share_prefixes))


def describe_data(data: PreparedData) -> dict[str, Any]:
    """Return what trackers store beside the arguments: row counts and shares of supervised tokens."""
    stats = {"train": data.train_stats, "held_out": data.held_out_stats}
    shares = {name: split.supervised_tokens / split.tokens for name, split in stats.items() if split}
    counts = count_rows(data)
    return {"data": counts if data.stream is None else counts | {"train": None}, "supervised_share": shares}
