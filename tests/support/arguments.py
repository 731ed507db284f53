"""What each key of a config does here: `docs/arguments.md` is made from this table (tests/test_arguments.py)."""

import dataclasses
from typing import Any

from transformers import TrainingArguments

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.config import REFUSED_KEYS

HONOURED, REFUSED, NO_EFFECT = "honoured", "refused", "without effect here"
EFFECT = "tests/test_arguments.py::test_a_key_changes_the_run"
SAME_RUN = "tests/test_arguments.py::test_a_key_changes_no_result"
REFUSAL = "tests/test_arguments.py::test_a_refused_key_is_one_line"
READ = "judged by reading"  # no test: it needs a GPU, several processes or nodes, or a hub


@dataclasses.dataclass(frozen=True)
class Argument:
    """on: a value that is not the default; check: a test's file and name, READ, or the reason of no effect."""

    status: str
    check: str
    on: Any = None


def _list_read(*names: str, **values: Any) -> dict[str, Argument]:
    return {name: Argument(HONOURED, READ, value) for name, value in {**dict.fromkeys(names), **values}.items()}


# Keys whose effect the weights, the log or the files of two steps show, with a value that differs from the tests' own.
CHANGES = {
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "optim": "adafactor",
    "weight_decay": 0.1,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-3,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.01,
    "bf16": True,
    "neftune_noise_alpha": 5.0,
    "logging_strategy": "no",
    "include_num_input_tokens_seen": True,
    "eval_strategy": "steps",
    "eval_on_start": False,
    "data_seed": 1,
    "seed": 1,
    "train_sampling_strategy": "sequential",
    "held_out": 3,
    "max_train_rows": 4,
    "system_prompt": "Be brief.",
    "lora": True,
    "trainable_modules": ["self_attn"],
    "template": "chat",
    "lora_rank": 4,
    "lora_alpha": 64,
    "lora_target_modules": ["q_proj"],
    "num_answers": 2,
    "num_instructions": 2,
    "max_new_tokens": 2,
    "num_train_epochs": 2,
    "lr_scheduler_type": "cosine",
    "logging_steps": 2,
    "logging_first_step": False,
    "eval_steps": 1,
    "eval_delay": 2,
    "save_strategy": "no",
    "save_steps": 1,
    "save_total_limit": 1,
    "save_only_model": True,
    "skip_memory_metrics": False,
}
# Other keys with which a key of CHANGES has an effect within two steps.
CONTEXT = {
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8},
    "lr_scheduler_type": {"max_steps": 3},
    "logging_steps": {"logging_first_step": False},
    "logging_first_step": {"logging_steps": 2},
    "eval_steps": {"eval_strategy": "steps", "eval_steps": 2},
    "eval_delay": {"eval_strategy": "steps", "eval_steps": 1},
    "save_total_limit": {"save_steps": 1},
    "lora_rank": {"lora": True},
    "lora_alpha": {"lora": True},
    "lora_target_modules": {"lora": True},
    "num_answers": {"max_new_tokens": 4},
    "num_instructions": {"max_new_tokens": 4},
    "max_new_tokens": {"num_answers": 2, "max_new_tokens": 4},
}
# Keys that change memory, speed or the library's messages: the run is the same.
SAME = {
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "eval_accumulation_steps": 1,
    "eval_use_gather_object": True,
    "torch_empty_cache_steps": 1,
    "log_level": "info",
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
    "dataloader_multiprocessing_context": "fork",
    "dataloader_pin_memory": False,
    "dataloader_in_order": False,
    "save_on_each_node": True,
}
NEEDED = {
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    **{
        f"dataloader_{name}": {"dataloader_num_workers": 1}
        for name in ("persistent_workers", "prefetch_factor", "multiprocessing_context")
    },
}

_REFUSED_VALUES = {
    "label_smoothing_factor": 0.1,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "parallelism_config": None,
    "enable_jit_checkpoint": True,
    "ignore_data_skip": True,
    "dataloader_drop_last": True,
    "length_column_name": "input_ids",
}

_TESTS = {
    "dtype": "tests/training/test_precision.py::test_a_run_in_bf16_trains_evaluates_and_answers_like_one_in_float32",
    "eval_tasks": "tests/training/test_final_tasks.py::test_a_run_ends_with_its_tasks",
    "attn_implementation": "tests/training/test_precision.py::"
    "test_the_given_attention_is_the_one_that_trains_and_not_the_one_of_the_checks",
    "output_dir": "tests/test_train.py::test_results_are_complete_and_on_disk",
    "lr_scheduler_kwargs": "tests/test_arguments.py::test_values_that_the_library_would_fail_on_or_ignore",
    "activation_checkpointing": "tests/test_train.py::test_activation_checkpointing_changes_no_loss",
    "gradient_checkpointing": "tests/test_train.py::test_activation_checkpointing_changes_no_loss",
    "project": "tests/training/test_trackers.py::test_trackio_has_the_config_and_the_data_statistics",
    "auto_find_batch_size": "tests/training/test_memory.py::"
    "test_auto_find_batch_size_lowers_the_batch_size_in_the_rehearsal",
    "disable_tqdm": "tests/training/test_trainer.py::test_no_progress_bar_with_disable_tqdm",
    "report_to": "tests/training/test_trackers.py::test_trackio_has_every_logged_value_in_one_run",
    "run_name": "tests/training/test_trackers.py::test_wandb_starts_online_or_offline_without_a_prompt",
    "per_device_eval_batch_size": "tests/training/test_trainer.py::"
    "test_evaluation_is_weighted_by_tokens_for_any_batch_size",
    "load_best_model_at_end": "tests/test_train.py::test_the_best_model_is_saved_and_training_stops_early",
    "metric_for_best_model": "tests/training/test_evaluation_callback.py::test_the_best_model_has_its_own_file",
    "greater_is_better": "tests/training/test_evaluation_callback.py::test_the_best_model_has_its_own_file",
    "restore_callback_states_from_checkpoint": "tests/training/test_checkpointing.py::"
    "test_early_stopping_patience_is_resumed",
    "accelerator_config": "tests/test_arguments.py::test_values_that_the_library_would_fail_on_or_ignore",
    "optim_args": "tests/test_arguments.py::test_values_that_the_library_would_fail_on_or_ignore",
    "optim_target_modules": "tests/test_arguments.py::test_values_that_the_library_would_fail_on_or_ignore",
    "torch_compile": "tests/training/test_compiled_runs.py::test_a_run_with_compiled_layers_is_the_run_without",
    "torch_compile_backend": "tests/training/test_compiled_runs.py::test_a_run_with_compiled_layers_is_the_run_without",
    "torch_compile_mode": "tests/training/test_compiled_runs.py::test_the_options_are_those_of_torch_compile",
    "tf32": "tests/test_config.py::test_tf32_is_on_by_default_where_a_gpu_has_it",
    "fsdp": "tests/training/test_fsdp.py::test_two_processes_with_a_sharded_model_train_like_one",
    "fsdp_config": "tests/training/test_fsdp.py::test_unsupported_settings_are_refused",
    "resume_from_checkpoint": "tests/test_train.py::test_a_resumed_run_ends_with_the_same_bits",
    "model_name_or_path": "tests/test_train.py::test_results_are_complete_and_on_disk",
    "train_data": "tests/data/test_pipeline.py::test_prepare",
    "eval_data": "tests/data/test_pipeline.py::test_rows_of_eval_data_are_not_trained",
    "train_data_weights": "tests/data/test_pipeline.py::test_weights",
    "skip_bad_rows": "tests/data/test_pipeline.py::test_bad_rows_are_skipped_when_asked",
    "chat_template": "tests/runs/test_trained_model.py::test_the_template_of_a_run_is_that_of_its_config",
    "chat_template_kwargs": "tests/runs/test_trained_model.py::test_the_template_of_a_run_is_that_of_its_config",
    "train_on": "tests/data/test_pipeline.py::test_the_encoder_has_the_configs_settings",
    "max_length": "tests/data/test_encode.py::test_drop",
    "overlong": "tests/data/test_encode.py::test_truncate_answer",
    "packing": "tests/test_train.py::test_packed_and_padded_runs_are_the_same_run",
    "share_prefixes": "tests/test_train.py::test_packed_and_padded_runs_are_the_same_run",
    "tokens_per_batch": "tests/test_train.py::test_a_budget_of_tokens_changes_no_loss",
    "pad_to_multiple_of": "tests/data/test_padding.py::test_padding_is_right_and_by_length",
    "peft": "tests/model/test_lora.py::test_the_fields_of_peft_are_trained_saved_resumed_and_merged",
    "add_tokens": "tests/model/test_new_tokens.py::test_new_tokens_under_lora",
    "load_in_4bit": "tests/model/test_quantization.py::test_a_run_resumes_bit_by_bit_and_every_way_to_load_it_agrees",
    "load_in_8bit": "tests/model/test_quantization.py::test_a_run_resumes_bit_by_bit_and_every_way_to_load_it_agrees",
    "lora_merge": "tests/model/test_lora.py::test_the_merged_model_computes_what_the_adapters_do",
    "prepared_data": "tests/data/test_shards.py::test_a_run_from_shards_is_the_run_without",
    "streaming": "tests/training/test_streaming.py::test_a_streamed_run_in_order_is_the_run_of_rows_in_memory",
    "num_proc": "tests/data/test_encode.py::test_two_processes_give_the_rows_of_one",
    "eval_answer_share": "tests/training/test_evaluation_callback.py::test_intermediate_answers_stay_under_their_share",
    "early_stopping_patience": "tests/test_train.py::test_the_best_model_is_saved_and_training_stops_early",
    "overwrite_output_dir": "tests/test_cli.py::test_a_folder_that_holds_a_run_is_refused_and_replaced_when_asked",
    "trust_remote_code": "tests/docs/test_security_page.py::test_code_that_a_model_brings_is_not_run_unless_asked_for",
    "revision": "tests/commands/test_loading_options.py::test_the_revision_is_that_of_model_and_tokenizer",
    "push_to_hub": "tests/training/test_hub.py::test_model_tokenizer_and_card_are_pushed_and_no_text_of_rows",
    "push_evaluation": "tests/training/test_hub.py::test_evaluations_previews_and_logs_are_pushed_if_asked_for",
    "hub_strategy": "tests/training/test_hub.py::test_a_strategy_that_pushes_checkpoints_is_refused_also_if_set_later",
    "use_liger_kernel": "tests/training/test_liger.py::test_a_model_with_its_kernels_trains_the_same_steps",
    "liger_kernel_config": "tests/training/test_liger.py::test_some_of_its_kernels_and_adapters",
    "trackio_static_space_id": "tests/training/test_hub.py::test_keys_that_would_do_nothing_are_refused",
    "hub_token": "tests/docs/test_security_page.py::test_a_config_and_its_record_hold_no_token",
}

_NO_EFFECT = {
    "logging_nan_inf_filter": ("the logged loss is our own mean, and a NaN stops the run", True),
    "prediction_loss_only": ("the held-out metrics are sums of rows, which are always returned", True),
    "include_for_metrics": ("the held-out metrics need the sums of rows only", ["loss"]),
    "label_names": ("rows always have the column `labels`", ["labels"]),
    "remove_unused_columns": ("set to false: all columns of encoded rows are inputs", False),
    "do_train": ("the command says what is done", True),
    "do_eval": ("the command says what is done; set held_out or eval_data", True),
    "do_predict": ("the command says what is done; see `generate`", True),
    "local_rank": ("launchers set LOCAL_RANK", 0),
    "use_cache": ("training keeps no keys and values; set in the saved config only", True),
}

ARGUMENTS: dict[str, Argument] = {
    **{name: Argument(HONOURED, EFFECT, value) for name, value in CHANGES.items()},
    **{name: Argument(HONOURED, SAME_RUN, value) for name, value in SAME.items()},
    **{name: Argument(REFUSED, REFUSAL, _REFUSED_VALUES[name]) for name in REFUSED_KEYS},
    "debug": Argument(REFUSED, "its hooks are on modules that fused layers do not call", "underflow_overflow"),
    **{name: Argument(HONOURED, check) for name, check in _TESTS.items()},
    **{name: Argument(NO_EFFECT, reason, on) for name, (reason, on) in _NO_EFFECT.items()},
    **_list_read(
        *("deepspeed", "hub_private_repo", "hub_model_id", "hub_always_push"),
        *("hub_revision", "trackio_space_id", "trackio_bucket_id"),
        *("full_determinism", "gradient_checkpointing_kwargs"),
        fp16=True,
        log_on_each_node=True,
        log_level_replica="info",
        use_cpu=True,
        ddp_find_unused_parameters=True,
        ddp_bucket_cap_mb=10,
        ddp_broadcast_buffers=True,
        ddp_static_graph=True,
        ddp_backend="gloo",
        ddp_timeout=60,
    ),
}


def write_table() -> str:
    """Return the text of docs/arguments.md."""
    lines = [
        "# Every key",
        "",
        "Made from `tests/support/arguments.py`, which `tests/test_arguments.py` checks against the pinned release of",
        "transformers. *Honoured*: the named test shows the effect; 'judged by reading' means that none does, as the",
        "key needs a GPU, several processes or nodes, or a hub. *Refused*: ends in one line with the",
        "remedy. *Without effect here*: with the reason. Types and defaults: `sft-pipeline train --help all`.",
    ]
    for title, fields in (("Keys of this project", SFTArguments), ("Keys of TrainingArguments", TrainingArguments)):
        lines += ["", f"## {title}", "", "| key | | shown by, or why |", "| --- | --- | --- |"]
        for key in dataclasses.fields(fields):
            argument = ARGUMENTS[key.name]
            check = f"{key.name} {REFUSED_KEYS[key.name]}" if key.name in REFUSED_KEYS else argument.check
            check = f"`{check.replace('::', ' ')}`" if check.startswith("tests/") else check
            lines.append(f"| `{key.name}` | {argument.status} | {check} |")
    return "\n".join(lines) + "\n"
