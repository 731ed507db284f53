"""The one seam with `transformers.Trainer`: what it cannot be told by arguments.

Loss, accumulation and many devices are the library's own: the model's forward pass returns the loss (see
model/supervised.py) over the number of targets that `Trainer` counts for the whole optimizer step. Ours are the
order of the rows (data/batches.py), the evaluation weighted by tokens, the true throughput, and a progress bar.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from sft_pipeline.data.batches import EpochLoader, StepBatches, row_lengths
from sft_pipeline.data.packing import PackedCollator


class SupervisedTrainer(Trainer):
    """`Trainer` over rows of `input_ids` and shifted `labels`, for a model prepared by `supervise`.

    tokens_per_batch: most tokens of a packed micro-batch, or 0 for per_device_train_batch_size rows.
    """

    def __init__(self, *args: Any, tokens_per_batch: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, compute_metrics=self._held_out_figures, **kwargs)
        self.row_sums = np.zeros((0, 3))  # of the last evaluation: nll in nats, targets, hits of each held-out row
        self._tokens_per_batch = tokens_per_batch
        self._tokens = 0
        self._paused_seconds = 0.0
        self._started = time.perf_counter()
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(TrainingProgress)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._tokens, self._paused_seconds, self._started = 0, 0.0, time.perf_counter()
        return super().train(*args, **kwargs)

    def training_batches(self) -> StepBatches:
        """The row numbers of this process' micro-batches."""
        args = self.args
        return StepBatches(
            row_lengths(self.train_dataset),
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
        return EpochLoader(
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

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self._tokens += real_tokens(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._paused_seconds += time.perf_counter() - started
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[None, Tensor, Tensor]:
        """Sums a row in the place of logits, so that the library gathers them and drops the rows it repeated."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = model(**inputs, row_figures=True).logits
        return None, sums, sums[:, 1]

    def _held_out_figures(self, prediction: EvalPrediction) -> dict[str, float]:
        self.row_sums = prediction.predictions
        return token_weighted(prediction)

    def tokens_per_second(self) -> float:
        """Real tokens (no padding) of all processes over the seconds of training alone."""
        tokens = self.accelerator.reduce(torch.tensor(self._tokens, device=self.args.device))
        seconds = time.perf_counter() - self._started - self._paused_seconds
        return tokens.item() / max(seconds, 1e-9)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {"tokens_per_second": round(self.tokens_per_second(), 1), "peak_memory_gib": peak_memory_gib()}
        super().log(logs, *args, **kwargs)


def real_tokens(inputs: dict[str, Tensor]) -> int:
    """Tokens of the batch's rows, each row counted whole: no padding, and a shared prefix once a row."""
    if "row_lengths" in inputs:
        prefix, *own = inputs["row_lengths"].tolist()
        return prefix * len(own) + sum(own)
    return int(inputs["attention_mask"].sum())


def token_weighted(prediction: EvalPrediction) -> dict[str, float]:
    """Held-out loss in nats a target, its exponential, and the share of targets that were the likeliest id."""
    nll, targets, correct = prediction.predictions.sum(axis=0)
    loss = nll / targets
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": float(loss), "perplexity": perplexity, "token_accuracy": float(correct / targets)}


def peak_memory_gib() -> float:
    """The most memory that was in use: of the device where it keeps count, else of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)


class TrainingProgress(ProgressCallback):
    """One bar with loss, tokens a second and time left; a line for each evaluation."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self.training_bar is None:
            return
        if "eval_loss" in logs:
            self.training_bar.write(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}, "
                f"token accuracy {logs['eval_token_accuracy']:.1%}"
            )
        elif "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:.0f} tokens/s")
