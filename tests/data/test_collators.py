"""The choice between packed and padded batches."""

from support.causal_models import tiny
from transformers import LlamaConfig

from sft_pipeline.data.collators import choose_collator
from sft_pipeline.data.packing import PackingCollator
from sft_pipeline.data.padding import PaddingCollator


def test_rows_are_packed_if_the_model_allows_it(tiny_model):
    collator, reason = choose_collator(tiny_model, longest=50, pad_token_id=3)
    assert isinstance(collator, PackingCollator) and reason is None


def test_without_packing_batches_are_padded(tiny_model):
    collator, reason = choose_collator(tiny_model, 50, pad_token_id=3, pad_to_multiple_of=4, packing=False)
    assert (collator, reason) == (PaddingCollator(3, 4), "packing: false")


def test_rows_longer_than_a_chunk_are_padded_and_shorter_ones_packed():
    model = tiny(LlamaConfig, attention_chunk_size=16)  # a key of Llama 4
    collator, reason = choose_collator(model, longest=17, pad_token_id=3)
    assert (collator, reason) == (PaddingCollator(3, 8), "LlamaForCausalLM attends within chunks of 16 tokens")
    assert isinstance(choose_collator(model, longest=16, pad_token_id=3)[0], PackingCollator)
