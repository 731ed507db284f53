"""The one seam with `transformers.Trainer`: what it cannot be told by arguments.

Loss, accumulation and many devices are the library's own: the model's forward pass returns the loss (see
model/loss_forward.py) over the number of targets that `Trainer` counts for the whole optimizer step. Ours are the
order of the rows (data/batch_sampler.py), the evaluation weighted by tokens, the true throughput, saving
(checkpointing.py), a rehearsal (memory.py), an end in good order after SIGTERM or a lost loss, and a progress bar
(progress.py).
"""

from __future__ import annotations

import math
import time
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback
from transformers.trainer_utils import EvalPrediction

from sft_pipeline.config import get_output_dir
from sft_pipeline.data.batch_sampler import EpochDataLoader, StepBatchSampler, count_row_tokens
from sft_pipeline.data.packing import PackedCollator
from sft_pipeline.runs.checkpoints import clear_leftovers
from sft_pipeline.training.checkpointing import CheckpointingTrainer
from sft_pipeline.training.divergence import describe_divergence, detect_divergence, write_diverged_rows
from sft_pipeline.training.memory import (
    describe_batch_remedy,
    handle_out_of_memory,
    measure_peak_memory_gib,
    rehearse_heaviest_batch,
    restore_random_states,
)
from sft_pipeline.training.preemption import SigtermHandler
from sft_pipeline.training.safe_unpickling import raise_on_unsafe_pickles
from sft_pipeline.utils.errors import RunPreempted, SFTError
from sft_pipeline.utils.progress import TrainingProgress


class SupervisedTrainer(CheckpointingTrainer):
    """`Trainer` over rows of `input_ids` and shifted `labels`, for a model prepared by `supervise`.

    tokens_per_batch: most tokens of a packed micro-batch, or 0 for per_device_train_batch_size rows.
    """

    # What the library allows for beside these is not used here.
    model: PreTrainedModel
    train_dataset: Dataset
    eval_dataset: Dataset
    processing_class: PreTrainedTokenizerBase | None

    def __init__(self, *, tokens_per_batch: int = 0, **kwargs: Any) -> None:
        super().__init__(compute_metrics=self._held_out_figures, **kwargs)
        self.row_loss_sums = np.zeros((0, 3))  # of the last evaluation: nll in nats, targets, hits of each held-out row
        self._tokens_per_batch = tokens_per_batch
        size = "tokens_per_batch" if tokens_per_batch else "per_device_train_batch_size"
        self._memory_remedy = describe_batch_remedy(size, self.args)
        self._tokens = 0
        self._paused_seconds = 0.0
        self._started = time.perf_counter()
        self._termination = SigtermHandler()
        self._checked_step = -1
        self._step_loss: Tensor | float = 0.0  # this process' part of the step's loss
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(TrainingProgress)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._tokens, self._paused_seconds = 0, 0.0  # the clock starts after the rehearsal
        self._saved_step, self._checked_step, self._step_loss = -1, -1, 0.0
        if self.args.should_save:
            clear_leftovers(get_output_dir(self.args))
        with self._termination, raise_on_unsafe_pickles(resume_from_checkpoint):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """And a rehearsal, in which the heaviest batch has to fit."""
        model, loader = super()._prepare_for_training(*args, **kwargs)
        rehearse_heaviest_batch(self, model, self.training_batches(), super().training_step, self._memory_remedy)
        self._started = time.perf_counter()
        return model, loader

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Tokens of each training row: start lines, rehearsal, loader and a lost loss all ask for them."""
        return count_row_tokens(self.train_dataset)

    def training_batches(self) -> StepBatchSampler:
        """The row numbers of this process' micro-batches."""
        args = self.args
        return StepBatchSampler(
            self._lengths,
            seed=args.seed if args.data_seed is None else args.data_seed,
            rows=self._train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size,
            process=args.process_index,
            tokens=self._tokens_per_batch,
            epochs=math.ceil(args.num_train_epochs),
            max_steps=args.max_steps,
            packed=isinstance(self.data_collator, PackedCollator),
            shuffle=args.train_sampling_strategy == "random",
        )

    def get_train_dataloader(self) -> DataLoader:
        """Not prepared by accelerate, which would deal batches anew; `Trainer` itself moves them to the device."""
        if self.args.train_sampling_strategy not in ("random", "sequential"):
            return super().get_train_dataloader()
        return EpochDataLoader(
            self.train_dataset,
            batch_sampler=self.training_batches(),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            in_order=self.args.dataloader_in_order,
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A run that goes on from its last step has none left; within an epoch, the library would train one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self._tokens += count_tokens(inputs)
        with handle_out_of_memory(f"step {self.state.global_step + 1}", self._memory_remedy, self.args):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss += loss
        return loss

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, epoch: float, *args: Any, **kwargs: Any
    ) -> None:
        """At the end of each step, and once more at that of an epoch. Raises Requeue when SIGTERM has come."""
        told = self._check_step(grad_norm, int(epoch))
        if told and self.args.metric_for_best_model is None:
            # There may be seconds left; the run that goes on begins with this evaluation (train.py). One that tells
            # the best model has to be made in its turn.
            self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *args, **kwargs)
        if told:
            if self._saved_step != self.state.global_step:
                self._save_checkpoint(model, trial)
            place = get_output_dir(self.args) / f"checkpoint-{self.state.global_step}"
            raise RunPreempted(f"SIGTERM: saved {place}; --resume_from_checkpoint auto goes on with it")

    def _check_step(self, grad_norm: Any, epoch: int) -> bool:
        """Whether any process got SIGTERM. Raises SFTError where the step's loss or its gradient is lost."""
        if self._checked_step == self.state.global_step:
            return False
        self._checked_step = self.state.global_step
        own = torch.tensor([float(self._termination.received), float(self._step_loss)], device=self.args.device)
        told, loss = self.accelerator.reduce(own, reduction="mean").tolist()
        self._step_loss = 0.0
        # A gradient scaler (fp16) leaves out steps whose gradient overflows, and trains on.
        norm = 0.0 if grad_norm is None or self.accelerator.optimizer_step_was_skipped else float(grad_norm)
        reason = detect_divergence(loss, norm, self.model.config.get_text_config().vocab_size)
        if reason:
            raise self._diverged(reason, epoch)
        return told > 0

    def _diverged(self, reason: str, epoch: int) -> SFTError:
        """The error that names the step's rows, whose text is left in the output folder."""
        folder, step, rows = get_output_dir(self.args), self.state.global_step, []
        if self.args.train_sampling_strategy in ("random", "sequential"):
            steps = self.training_batches().split_epoch(epoch)
            rows = steps[(step - 1) % len(steps)].tolist()
        if self.args.should_save:
            write_diverged_rows(folder, rows, self.train_dataset, self.processing_class)
        return SFTError(describe_divergence(folder, step, reason, rows))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Nothing is drawn (a data loader draws where it begins), so that it does not matter when it comes."""
        started, remedy = time.perf_counter(), "lower per_device_eval_batch_size"
        with handle_out_of_memory("an evaluation", remedy, self.args), restore_random_states(self.args.device):
            metrics = super().evaluate(*args, **kwargs)
        self._paused_seconds += time.perf_counter() - started
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[None, Tensor, Tensor]:
        """Sums a row in the place of logits, so that the library gathers them and drops the rows it repeated."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = model(**inputs, return_row_losses=True).logits
        return None, sums, sums[:, 1]

    def _held_out_figures(self, prediction: EvalPrediction) -> dict[str, float]:
        self.row_loss_sums = np.asarray(prediction.predictions)
        return compute_eval_metrics(prediction)

    def tokens_per_second(self) -> float:
        """Real tokens (no padding) of all processes over the seconds of training alone."""
        tokens = self.accelerator.reduce(torch.tensor(self._tokens, device=self.args.device))
        seconds = time.perf_counter() - self._started - self._paused_seconds
        return tokens.item() / max(seconds, 1e-9)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {
                "tokens_per_second": round(self.tokens_per_second(), 1),
                "peak_memory_gib": measure_peak_memory_gib(),
            }
        super().log(logs, *args, **kwargs)


def count_tokens(inputs: dict[str, Tensor]) -> int:
    """Tokens of the batch's rows, each row counted whole: no padding, and a shared prefix once a row."""
    if "row_lengths" in inputs:
        prefix, *own = inputs["row_lengths"].tolist()
        return prefix * len(own) + sum(own)
    return int(inputs["attention_mask"].sum())


def compute_eval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Held-out loss in nats a target, its exponential, and the share of targets that were the likeliest id."""
    nll, targets, correct = np.asarray(prediction.predictions).sum(axis=0)
    loss = nll / targets
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": float(loss), "perplexity": perplexity, "token_accuracy": float(correct / targets)}
