"""Print the peak memory of a short run on the CPU, beside its estimate: python peak_memory.py KEYS FOLDER.

KEYS: keys of SFTConfig as JSON. A first run of a tiny model loads what every run does; memory counts from there.
"""

import json
import sys
import warnings
from pathlib import Path

import psutil
from support.trainers import make_rows
from transformers import LlamaConfig, LlamaForCausalLM

from sft_pipeline.config import SFTConfig
from sft_pipeline.data.packing import PackingCollator
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model.lora import add_adapters, round_frozen_layers
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.peft_config import build_peft_config
from sft_pipeline.training.memory import measure_peak_rss
from sft_pipeline.training.memory_estimate import MemoryEstimate, estimate_memory
from sft_pipeline.training.precision import should_round_frozen_layers
from sft_pipeline.training.trainer import SupervisedTrainer

ROWS, PROMPT_TOKENS, TARGETS = 8, 102, 154
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 4, "vocab_size": 4000}
TINY = SHAPE | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 100}


def run(keys: dict, folder: Path, shape: dict) -> MemoryEstimate:
    """Train two steps, in one micro-batch each."""
    args = SFTConfig(
        str(folder), use_cpu=True, max_steps=2, report_to="none", disable_tqdm=True, save_strategy="no",
        eval_strategy="no", eval_on_start=False, per_device_train_batch_size=ROWS, dataloader_num_workers=0, **keys,
    )  # fmt: skip
    args.remove_unused_columns = False
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**shape, **special))
    patch_loss_forward(model)
    collator = PackingCollator(model)
    if args.lora:
        model = add_adapters(model, build_peft_config(args))
    if should_round_frozen_layers(model, args):
        round_frozen_layers(model)
    use_fused_layers(model)
    rows = make_rows([(PROMPT_TOKENS - 2, TARGETS)] * (2 * ROWS))  # two more tokens are common to all
    SupervisedTrainer(model=model, args=args, data_collator=collator, train_dataset=rows).train()
    share = TARGETS / (PROMPT_TOKENS + TARGETS)
    return estimate_memory(model, args, ROWS * (PROMPT_TOKENS + TARGETS), packed=True, supervised_share=share)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    keys, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    run(keys, folder, TINY)
    start = psutil.Process().memory_info().rss
    estimate = run(keys, folder, SHAPE)
    peak = measure_peak_rss() - start
    print(json.dumps({"peak": peak, "estimate": estimate.total, "parts": str(estimate)}))
