"""The choice between packed and padded batches."""

from transformers import MistralConfig, MistralForCausalLM

from sft_pipeline.data.collators import choose_collator
from sft_pipeline.data.packing import PackingCollator
from sft_pipeline.data.padding import PaddingCollator


def build_windowed_model(window: int) -> MistralForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=window, **sizes))


def test_rows_are_packed_if_the_model_allows_it(tiny_model):
    collator, reason = choose_collator(tiny_model, longest=50, pad_token_id=3)
    assert isinstance(collator, PackingCollator) and reason is None


def test_without_packing_batches_are_padded(tiny_model):
    collator, reason = choose_collator(tiny_model, 50, pad_token_id=3, pad_to_multiple_of=4, packing=False)
    assert (collator, reason) == (PaddingCollator(3, 4), "packing: false")


def test_rows_longer_than_a_window_are_padded_and_shorter_ones_packed():
    model = build_windowed_model(16)
    collator, reason = choose_collator(model, longest=17, pad_token_id=3)
    assert (collator, reason) == (PaddingCollator(3, 8), "MistralForCausalLM attends within a window of 16 tokens")
    assert isinstance(choose_collator(model, longest=16, pad_token_id=3)[0], PackingCollator)
