"""All private names of other libraries that `sft_pipeline` uses, why, and their signatures in the pinned releases.

A private name may change in any release without a deprecation. tests/test_private_names.py compares this table with the
code and with the installed libraries.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import datasets
import evaluate
import torch
from torch import nn
from torch.distributed import distributed_c10d
from transformers import PreTrainedConfig, Trainer


class PrivateName(NamedTuple):
    """A private name that a file uses, or a private method that one of its classes overrides."""

    file: str  # in sft_pipeline
    name: str
    library: str
    get: Callable[[], Any]  # returns the function, the operators or the attribute of that name
    signature: str  # without types; of operators, their schemas with types; of an attribute, its type
    reason: str


ONEDNN_REASON = "torch has no public operator that computes a linear layer and what follows it in one pass of oneDNN"
EVALUATE_REASON = "evaluate documents it as a method that every metric defines"

PRIVATE_NAMES = (
    PrivateName(
        "kernels/cpu_attention.py",
        "_softmax_backward_data",
        "torch",
        lambda: torch.ops.aten._softmax_backward_data,
        "aten::_softmax_backward_data(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype) -> Tensor; "
        "aten::_softmax_backward_data.out(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype, *, "
        "Tensor(a!) grad_input) -> Tensor(a!)",
        "public operators give other bits; autograd of torch.softmax gives the same but is slower and keeps the scores",
    ),
    PrivateName(
        "kernels/cpu_layer_inference.py",
        "_linear_pointwise",
        "torch",
        lambda: torch.ops.mkldnn._linear_pointwise,
        "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> "
        "Tensor Y; "
        "mkldnn::_linear_pointwise.binary(Tensor X, Tensor other, Tensor W, Tensor? B, str attr) -> Tensor Y",
        ONEDNN_REASON,
    ),
    PrivateName(
        "kernels/cpu_layer_inference.py",
        "_reorder_linear_weight",
        "torch",
        lambda: torch.ops.mkldnn._reorder_linear_weight,
        "mkldnn::_reorder_linear_weight(Tensor self, int? batch_size=None) -> Tensor Y",
        ONEDNN_REASON,
    ),
    PrivateName(
        "kernels/cpu_layer_inference.py",
        "_forward_hooks",
        "torch",
        lambda: nn.Identity()._forward_hooks,
        "OrderedDict",
        "a fused layer does not call its modules, and torch has no public way to ask whether a module has hooks",
    ),
    PrivateName(
        "kernels/cpu_layer_inference.py",
        "_forward_pre_hooks",
        "torch",
        lambda: nn.Identity()._forward_pre_hooks,
        "OrderedDict",
        "as _forward_hooks",
    ),
    PrivateName(
        "kernels/cuda_attention.py",
        "_dynamo",
        "torch",
        lambda: torch._dynamo.maybe_mark_dynamic,
        "(t, index)",
        "torch.compiler has no name of its own for what its documentation calls torch._dynamo.maybe_mark_dynamic",
    ),
    PrivateName(
        "data/streamed_sources.py",
        "_ex_iterable",
        "datasets",
        lambda: datasets.Dataset.from_dict({"a": [1]}).to_iterable_dataset()._ex_iterable,
        "ArrowExamplesIterable",
        "neither the state of an IterableDataset nor a public attribute tells whether it has a shuffle buffer",
    ),
    PrivateName(
        "evaluation/metrics/hf_metrics.py",
        "_info",
        "evaluate",
        lambda: evaluate.Metric._info,
        "(self)",
        EVALUATE_REASON,
    ),
    PrivateName(
        "evaluation/metrics/hf_metrics.py",
        "_compute",
        "evaluate",
        lambda: evaluate.Metric._compute,
        "(self, *, predictions=None, references=None, **kwargs)",
        EVALUATE_REASON,
    ),
    PrivateName(
        "model/packed_attention.py",
        "_attn_implementation",
        "transformers",
        lambda: PreTrainedConfig()._attn_implementation,
        "NoneType",
        "a model has set_attn_implementation, but no public way to read what was set",
    ),
    PrivateName(
        "training/rank_failures.py",
        "_get_default_store",
        "torch",
        lambda: distributed_c10d._get_default_store,
        "()",
        "the public ProcessGroup.get_group_store is missing in torch 2.8, the oldest release in setup.cfg",
    ),
    PrivateName(
        "training/checkpointing.py",
        "_get_output_dir",
        "transformers",
        lambda: Trainer._get_output_dir,
        "(self, trial)",
        "_save_checkpoint of the library takes the folder it writes to from here alone",
    ),
    PrivateName(
        "training/checkpointing.py",
        "_save_checkpoint",
        "transformers",
        lambda: Trainer._save_checkpoint,
        "(self, model, trial)",
        "the library writes into the final folder, so that a kill leaves an incomplete checkpoint",
    ),
    PrivateName(
        "training/fsdp.py",
        "_load_from_checkpoint",
        "transformers",
        lambda: Trainer._load_from_checkpoint,
        "(self, resume_from_checkpoint, model=None)",
        "the library loads an FSDP checkpoint only with FSDP, and only with its own state_dict_type",
    ),
    PrivateName(
        "training/fsdp.py",
        "_load_best_model",
        "transformers",
        lambda: Trainer._load_best_model,
        "(self)",
        "as _load_from_checkpoint",
    ),
    PrivateName(
        "training/fsdp.py",
        "_load_optimizer_and_scheduler",
        "transformers",
        lambda: Trainer._load_optimizer_and_scheduler,
        "(self, checkpoint)",
        "the library loads an FSDP optimizer state only with FSDP",
    ),
    PrivateName(
        "training/trainer.py",
        "_run_epoch",
        "transformers",
        lambda: Trainer._run_epoch,
        "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
        "the library trains one step too many when it resumes from the last step within an epoch",
    ),
)
