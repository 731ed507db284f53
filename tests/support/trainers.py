"""A tiny model, random rows and a trainer for them."""

import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from sft_pipeline.data.packing import PackingCollator
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.packed_attention import use_packed_attention
from sft_pipeline.training.trainer import SupervisedTrainer

IGNORED, VOCABULARY = -100, 97


def make_model(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.2, **sizes, **special_tokens, **config)
    )
    patch_loss_forward(model)
    use_packed_attention(model)
    return model


def make_rows(lengths: list[tuple[int, int]], seed: int = 3) -> Dataset:
    """Return random rows with a common prefix of two tokens. lengths: (prompt, trained) tokens of each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = [[1, 2, *torch.randint(3, VOCABULARY, (g + t,), generator=generator).tolist()] for g, t in lengths]
    labels = [[IGNORED] * (len(row) - t - 1) + row[len(row) - t :] + [IGNORED] for row, (_, t) in zip(ids, lengths)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def join_rows(rows: Dataset, sizes: list[int]) -> Dataset:
    """Join neighbouring rows, as many as `sizes` say, to conversations of several sequences."""
    conversations, start = [], 0
    for size in sizes:
        part = rows[start : start + size]
        conversations.append({key: [value for line in lines for value in line] for key, lines in part.items()})
        conversations[-1]["sequence_lengths"] = [len(line) for line in part["input_ids"]]
        start += size
    return Dataset.from_list(conversations)


UNEVEN = make_rows([(3, 1), (2, 20), (5, 2), (1, 9), (7, 1), (4, 3), (2, 14), (6, 5)])


def make_trainer(
    folder, collator="padded", rows=UNEVEN, held_out=None, callbacks=(), tokens_per_batch=0, model=None, **arguments
) -> SupervisedTrainer:
    training = TrainingArguments(
        **{
            "output_dir": str(folder),
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0,
            "max_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "report_to": "none",
            "logging_steps": 1,
            **arguments,
        }
    )
    model = model or make_model()
    return SupervisedTrainer(
        model=model,
        args=training,
        data_collator=PackingCollator(model) if collator == "packed" else PaddingCollator(0),
        train_dataset=rows,
        eval_dataset=held_out,
        callbacks=list(callbacks),
        tokens_per_batch=tokens_per_batch,
    )


class CallBeforeStep(TrainerCallback):
    """Call `action` before step `step` + 1."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()
