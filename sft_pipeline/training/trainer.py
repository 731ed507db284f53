"""The `Trainer` subclass that training uses, for what the arguments of `transformers.Trainer` cannot set.

Loss, accumulation and multiple devices are left to the library: the forward pass of the model returns the loss (see
model/loss_forward.py), divided by the number of targets that `Trainer` counts over the whole optimizer step. Added are
the order of the rows (data/batch_sampler.py), an evaluation weighted by tokens, throughput without padding, atomic
checkpoints (checkpointing.py), a rehearsal of the heaviest batch (memory.py), a clean stop after SIGTERM
(preemption.py) or divergence (divergence.py), and a progress bar (utils/progress.py).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalPrediction

from sft_pipeline.config import get_output_dir
from sft_pipeline.data.batch_sampler import MICRO_BATCHES, EpochDataLoader, StepBatchSampler, count_row_tokens
from sft_pipeline.data.packing import PackingCollator
from sft_pipeline.data.row_stream import (
    STEP_ROWS,
    STREAM_STATE,
    RowStream,
    StepStream,
    StreamAccount,
    build_stream_loader,
)
from sft_pipeline.data.splits import index_sets
from sft_pipeline.data.streamed_sources import State
from sft_pipeline.kernels.cpu_layer_training import find_unused_forward
from sft_pipeline.model.loss_forward import check_loss_forward
from sft_pipeline.model.packed_attention import check_packed_attention
from sft_pipeline.runs.checkpoints import clear_leftovers
from sft_pipeline.training.checkpointing import CheckpointingTrainer, RunningLoss, read_stream_state
from sft_pipeline.training.device_check import check_on_device
from sft_pipeline.training.divergence import describe_divergence, detect_divergence, write_diverged_rows
from sft_pipeline.training.memory import (
    describe_batch_remedy,
    handle_out_of_memory,
    measure_peak_memory_gib,
    rehearse_heaviest_batch,
    restore_random_states,
)
from sft_pipeline.training.preemption import PreemptionCallback, SigtermHandler, guard_workers
from sft_pipeline.training.safe_unpickling import raise_on_unsafe_pickles
from sft_pipeline.utils.constants import IGNORED
from sft_pipeline.utils.errors import SFTError
from sft_pipeline.utils.progress import TrainingProgress


class Rehearsal(TrainerCallback):
    """Rehearse the heaviest batch before the first step, when model and optimizer are prepared and loaded."""

    def __init__(self, trainer: SupervisedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.rehearse()


class StepCheck(PreemptionCallback):
    """Check each step for divergence and SIGTERM, before it is logged, evaluated and saved.

    Where reading a value would make the host wait for the device, a step is checked when the next one ends, unless
    something is due after it.
    """

    def __init__(self, trainer: SupervisedTrainer) -> None:
        super().__init__()
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_due = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if self.trainer.check_steps(wait=is_due or state.global_step >= state.max_steps):
            self.stop(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.check_pending_step():
            self.stop(args, control)
        super().on_epoch_end(args, state, control, **kwargs)


class RunRehearsed(Exception):
    """Raised in place of the first step of a dry run."""


@dataclass(frozen=True)
class RunPlan:
    """What a run would do. tokens: computed, of all its steps; tokens_per_second: of all processes in the heaviest
    batch, or None where it was not run; sample_rows: of a stream, how many rows the tokens are estimated from."""

    rows: int
    steps: int
    tokens: int
    tokens_per_second: float | None
    sample_rows: int = 0

    def __str__(self) -> str:
        text = f"{self.rows:,} rows, {self.steps:,} steps, {self.tokens:,} tokens"
        if self.sample_rows:
            text += f" (estimated from the first {self.sample_rows:,} rows)"
        if self.tokens_per_second is None:
            return text
        seconds = self.tokens / self.tokens_per_second
        amount = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
        return (
            f"{text}: about {amount} at {self.tokens_per_second:,.0f} tokens/s, as in the heaviest batch, without "
            "optimizer, evaluations and saving"
        )


@dataclass(frozen=True)
class StepSums:
    """What is known of a step when it ends, still on its way to the host.

    values: (3,) on the host: whether a process received SIGTERM, loss, and gradient norm. copied: the event after which
    they are there, or None.
    """

    step: int
    values: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> tuple[bool, float, float]:
        """Return (received, loss, gradient norm); waits for the copy."""
        if self.copied is not None:
            self.copied.synchronize()
        received, loss, norm = self.values.tolist()
        return received > 0, loss, norm


class SupervisedTrainer(CheckpointingTrainer):
    """`Trainer` for rows of `input_ids` and shifted `labels`, and a model prepared by `patch_loss_forward`.

    tokens_per_batch: maximum tokens of a packed micro-batch, or 0 for per_device_train_batch_size rows. The rows of an
    optimizer step are the same with and without it; the micro-batches that they need are run by one `training_step`, so
    `gradient_accumulation_steps` of `args` becomes 1 and its batch size that many times larger.

    stream: trained in place of `train_dataset`, which is then a sample of it, for estimates.
    """

    # Narrower than in the library, which allows other types.
    model: PreTrainedModel
    train_dataset: Dataset
    eval_dataset: Dataset
    processing_class: PreTrainedTokenizerBase | None

    def __init__(self, *, tokens_per_batch: int = 0, stream: RowStream | None = None, **kwargs: Any) -> None:
        if tokens_per_batch:
            args: TrainingArguments = kwargs["args"]
            args.per_device_train_batch_size *= args.gradient_accumulation_steps
            args.gradient_accumulation_steps = 1
        super().__init__(compute_metrics=self._compute_eval_metrics, **kwargs)
        if tokens_per_batch and self.is_deepspeed_enabled:
            raise SFTError("tokens_per_batch: DeepSpeed counts micro-batches of its own; set it to 0")
        self.row_loss_sums = np.zeros((0, 3))  # of the last evaluation, per row: nll in nats, targets, correct targets
        self.eval_sets: dict[str, np.ndarray] = {}  # of the last evaluation: the indices of the rows of each named set
        self.evaluates_other_rows = False  # in place of `eval_dataset`, in the last evaluation
        self._tokens_per_batch = tokens_per_batch
        self.stream = stream
        size_key = "tokens_per_batch" if tokens_per_batch else "per_device_train_batch_size"
        self._memory_remedy = describe_batch_remedy(size_key, self.args)
        self._num_tokens = 0
        self._eval_seconds = 0.0
        self._start_time = time.perf_counter()
        self._sigterm = SigtermHandler()
        self._step_loss: Tensor | float = 0.0  # this process' part of the loss of the current step
        self._pending: StepSums | None = None  # of a step that is not checked yet
        self._first_stream_state: State | None = None  # where a run that is resumed begins
        self._step_rows: list[list[str]] = []  # where the rows of the last two steps of a stream are from
        self._is_dry_run = False
        self._rehearsed_tokens_per_second: float | None = None  # of one process
        # First, so that nothing else is started before the heaviest batch is known to fit.
        self.callback_handler.callbacks.insert(0, Rehearsal(self))
        self.add_callback(StepCheck(self))
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(TrainingProgress)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; raises RunPreempted after SIGTERM, and SFTError for divergence or an unsafe checkpoint."""
        checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        self._num_tokens, self._eval_seconds, self._step_loss = 0, 0.0, 0.0  # the clock starts after the rehearsal
        self._pending = None
        self.running_loss = RunningLoss.read(Path(checkpoint)) if checkpoint else RunningLoss()
        self.stream_state = read_stream_state(checkpoint, self.stream is not None) if checkpoint else None
        self._first_stream_state = self.stream_state
        if self.args.should_save:
            clear_leftovers(get_output_dir(self.args))
        with self._sigterm, raise_on_unsafe_pickles(resume_from_checkpoint):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        output.metrics["tokens_per_second"] = round(self.tokens_per_second(), 1)
        return output

    def create_accelerator_and_postprocess(self) -> None:
        """Keep the gradient norm of each step, which `check_step` needs and no callback gets."""
        super().create_accelerator_and_postprocess()
        clip_grad_norm = self.accelerator.clip_grad_norm_
        self._grad_norm: Any = None

        def clip_and_keep_norm(*args: Any, **kwargs: Any) -> Any:
            self._grad_norm = clip_grad_norm(*args, **kwargs)
            return self._grad_norm

        self.accelerator.clip_grad_norm_ = clip_and_keep_norm

    def check_forwards(self) -> None:
        """Raise SFTError if a forward or the attention of the model was replaced after the model was prepared."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        check_loss_forward(model)
        if isinstance(self.data_collator, PackingCollator):
            check_packed_attention(model)
        if name := find_unused_forward(model):
            raise SFTError(
                f"the forward of {name} was replaced after the trainer prepared the model, and would not be called; "
                "replace it before the trainer is built"
            )

    def dry_run(self) -> RunPlan:
        """Prepare model and optimizer as for training, and run the heaviest batch, but no step.

        Raises what `train` would raise before its first step.
        """
        self._is_dry_run = True
        try:
            super().train()
        except RunRehearsed:
            pass
        finally:
            self._is_dry_run = False
        steps, rate = self.state.max_steps, self._rehearsed_tokens_per_second
        num_rows = steps * self.get_total_train_batch_size(self.args)
        num_available = num_rows if self.stream is not None else len(self.train_dataset)
        if self.args.max_steps <= 0:
            num_rows = round(len(self.train_dataset) * self.args.num_train_epochs)  # the last step of an epoch is short
        tokens = round(num_rows * float(self._row_lengths.mean()))
        sample_rows = len(self.train_dataset) if self.stream is not None else 0
        return RunPlan(num_available, steps, tokens, rate and rate * self.data_ranks[0], sample_rows)

    def rehearse(self) -> None:
        """Check the model, run the heaviest batch once, and start the clock."""
        self.check_forwards()
        check_on_device(self, packed=isinstance(self.data_collator, PackingCollator))
        batches, step = self.build_batch_sampler(), self._run_micro_batch
        # The first run of a batch takes longer: memory is allocated and kernels are compiled.
        self._rehearsed_tokens_per_second = rehearse_heaviest_batch(
            self, self.model_wrapped, batches, step, self._memory_remedy, repeats=2 if self._is_dry_run else 1
        )
        if self._is_dry_run:
            raise RunRehearsed
        self._start_time = time.perf_counter()

    @cached_property
    def _row_lengths(self) -> np.ndarray:
        """Number of computed tokens of each training row by itself, counted once for all batch samplers."""
        return count_row_tokens(self.train_dataset, share_prefixes=self._shares_prefixes)

    @property
    def _shares_prefixes(self) -> bool:
        return getattr(self.data_collator, "share_prefixes", False)

    def build_batch_sampler(self) -> StepBatchSampler:
        """Return the sampler of this process, which yields the row indices of each micro-batch."""
        args = self.args
        return StepBatchSampler(
            self._row_lengths,
            seed=args.seed if args.data_seed is None else args.data_seed,
            rows=self.get_total_train_batch_size(args) // (args.gradient_accumulation_steps * self.data_ranks[0]),
            accumulation=args.gradient_accumulation_steps,
            processes=self.data_ranks[0],
            process=self.data_ranks[1],
            tokens=self._tokens_per_batch,
            packed=isinstance(self.data_collator, PackingCollator),
            shuffle=args.train_sampling_strategy == "random",
        )

    def get_train_dataloader(self) -> DataLoader:
        """Return the data loader of this process' micro-batches.

        It is not prepared by accelerate, which would split the batches once more among the processes; `Trainer` moves
        batches to the device.
        """
        if self.args.train_sampling_strategy not in ("random", "sequential"):
            return guard_workers(super().get_train_dataloader())
        options = {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "persistent_workers": self.args.dataloader_persistent_workers,
            "multiprocessing_context": self.args.dataloader_multiprocessing_context,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
            "in_order": self.args.dataloader_in_order,
        }
        batches = self.build_batch_sampler()
        if self.stream is not None:
            steps = StepStream(self.stream, batches, self._shares_prefixes, self._first_stream_state)
            loader: DataLoader = build_stream_loader(steps, self.data_collator, **options)
        else:
            loader = EpochDataLoader(
                self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator, **options
            )
        return guard_workers(loader)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return guard_workers(super().get_eval_dataloader(*args, **kwargs))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train one epoch, unless all steps are done.

        Overridden because the library trains one step too many when it resumes from the last step within an epoch.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.stream is not None:
            # The library skips the batches of the steps that are done; the stream begins after them.
            kwargs["train_dataloader"].dataset.skipped = kwargs["steps_trained_in_current_epoch"]
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """Return the batches of an optimizer step, and the number of their targets over all processes, on `device`.

        As in the library, which waits for the device when it copies the number to it.
        """
        with nullcontext() if self.stream is None else self.times.measure("waiting for rows"):
            batches = list(islice(epoch_iterator, num_batches))
        if self.stream is not None:
            self._take_stream_state(batches)
        count = sum(int(batch["shift_labels"].ne(IGNORED).sum()) for batch in batches)
        num_targets = torch.full((), float(count), device=device)  # filled on the device
        return batches, self.accelerator.reduce(num_targets, reduction="sum")

    def _take_stream_state(self, batches: list[Any]) -> None:
        """Take the state of the stream after this step from its batches. Raises the error of a row that ended it."""
        for batch in batches:
            if isinstance(batch, SFTError):
                raise batch
        self.stream_state = json.loads(batches[-1].pop(STREAM_STATE))
        self._step_rows = [*self._step_rows[-1:], batches[-1].pop(STEP_ROWS)]

    @property
    def stream_account(self) -> StreamAccount:
        """What became of the rows that the steps so far were made of."""
        assert self.stream_state is not None
        return StreamAccount.from_state(self.stream_state["account"])

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of each micro-batch in `inputs`; return the sum of their losses.

        Counts tokens, sums the loss of the step, and reports if memory runs out. Gradients are reduced over the
        processes in the last micro-batch.
        """
        micro_batches = inputs.get(MICRO_BATCHES, [inputs])
        sync_each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        losses = []
        with handle_out_of_memory(f"step {self.state.global_step + 1}", self._memory_remedy, self.args):
            for index, micro_batch in enumerate(micro_batches, start=1):
                self._num_tokens += count_tokens(micro_batch)
                syncs = sync_each or index == len(micro_batches)
                with nullcontext() if syncs else self.accelerator.no_sync(model):
                    losses.append(self._run_micro_batch(model, micro_batch, num_items_in_batch))
        loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
        self._step_loss += loss
        return loss

    def _run_micro_batch(
        self, model: nn.Module, inputs: dict[str, Any], num_targets: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of one micro-batch, whose tensors are copied without waiting for the device."""
        inputs = {
            key: value.to(self.args.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }
        return super().training_step(model, inputs, num_targets)

    def check_steps(self, wait: bool) -> bool:
        """Check the step before, and with `wait` or on a CPU also the step that has just ended.

        Returns whether any process received SIGTERM. Raises SFTError if the loss or gradient of a step diverged, before
        anything of it is logged or saved.
        """
        received = self.check_pending_step()
        self._pending = self._reduce_step()
        if wait or self._pending.copied is None:
            received |= self.check_pending_step()
        return received

    def check_pending_step(self) -> bool:
        """Check the step that is not checked yet, if there is one; see `check_steps`."""
        if self._pending is None:
            return False
        pending, self._pending = self._pending, None
        received, loss, norm = pending.read()
        reason = detect_divergence(loss, norm, self.model.config.get_text_config().vocab_size)
        if reason:
            raise self._build_divergence_error(reason, pending.step)
        self.running_loss.add(loss)
        return received

    def _reduce_step(self) -> StepSums:
        """Average what each process knows of the step that has just ended, and start to copy it to the host."""
        device = self.args.device
        # The gradient scaler of fp16 skips steps whose gradient overflows, and training goes on.
        has_norm = self._grad_norm is not None and not self.accelerator.optimizer_step_was_skipped
        norm = self._grad_norm if has_norm else 0.0
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Filled on the device: a copy of a host value would wait for it.
        values = [
            value.detach().float() if isinstance(value, Tensor) else torch.full((), float(value), device=device)
            for value in (self._sigterm.received, self._step_loss, norm)
        ]
        self._step_loss = 0.0
        mean = self.accelerator.reduce(torch.stack([value.to(device) for value in values]), reduction="mean")
        if device.type != "cuda":
            return StepSums(self.state.global_step, mean.cpu(), None)
        copied = torch.cuda.Event()
        host_values = mean.to("cpu", non_blocking=True)
        copied.record()
        return StepSums(self.state.global_step, host_values, copied)

    def _build_divergence_error(self, reason: str, step: int) -> SFTError:
        """Write the rows of the step to the output folder, and return the error that lists them."""
        folder, rows = get_output_dir(self.args), []
        if self.stream is not None:
            return SFTError(
                describe_divergence(folder, step, reason, self._step_rows[step - self.state.global_step - 1])
            )
        if self.args.train_sampling_strategy in ("random", "sequential"):
            sampler = self.build_batch_sampler()
            epoch, index = divmod(step - 1, len(sampler.split_epoch(0)))
            rows = sampler.split_epoch(epoch)[index].tolist()
        if self.args.should_save:
            write_diverged_rows(folder, rows, self.train_dataset, self.processing_class)
        return SFTError(describe_divergence(folder, step, reason, rows))

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without changing a random state, which the start of a data loader does.

        So training is the same whenever evaluations come. The metrics are those of all rows, and, under their names,
        those of each held-out set (`join_sets`): it is evaluated in one pass, in which each row counts once.

        eval_dataset: other encoded rows, of which only the loss, perplexity and accuracy are computed.
        """
        self.check_forwards()
        self.evaluates_other_rows = eval_dataset is not None and eval_dataset is not self.eval_dataset
        self.eval_sets = index_sets(self.eval_dataset if eval_dataset is None else eval_dataset)
        start, remedy = time.perf_counter(), "lower per_device_eval_batch_size"
        with handle_out_of_memory("an evaluation", remedy, self.args), restore_random_states(self.args.device):
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        self._eval_seconds += time.perf_counter() - start
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[None, Tensor, Tensor]:
        """Return the sums of each row in place of logits and labels.

        The library gathers them from all processes and drops rows that it repeated to fill the last batch.
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = model(**inputs, return_row_losses=True).logits
        return None, sums, sums[:, 1]

    def _compute_eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        self.row_loss_sums = sums = np.asarray(prediction.predictions)
        metrics = compute_eval_metrics(sums)
        for set_name, rows in self.eval_sets.items():
            metrics |= {f"{set_name}_{name}": value for name, value in compute_eval_metrics(sums[rows]).items()}
        return metrics

    def tokens_per_second(self) -> float:
        """Compute the throughput: tokens of all processes without padding / seconds without evaluations."""
        tokens = self.accelerator.reduce(torch.tensor(self._num_tokens, device=self.args.device))
        seconds = time.perf_counter() - self._start_time - self._eval_seconds
        return tokens.item() / max(seconds, 1e-9)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the mean loss since the last log, also over a resume, and add throughput and peak memory."""
        if "loss" in logs:
            logs |= {
                "loss": self.running_loss.pop_mean(),
                "tokens_per_second": round(self.tokens_per_second(), 1),
                "peak_memory_gib": measure_peak_memory_gib(),
            }
        super().log(logs, *args, **kwargs)


def count_tokens(inputs: dict[str, Tensor]) -> int:
    """Count the tokens of the sequences in a batch, without padding; a shared prefix counts for each sequence."""
    return int(inputs["token_counts" if "token_counts" in inputs else "attention_mask"].sum())


def compute_eval_metrics(row_sums: np.ndarray) -> dict[str, float]:
    """Compute held-out loss (nats per target), perplexity, and token accuracy (argmax) from the sums of each row,
    (rows, 3)."""
    nll, targets, correct = row_sums.sum(axis=0)
    loss = nll / targets
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": float(loss), "perplexity": perplexity, "token_accuracy": float(correct / targets)}
