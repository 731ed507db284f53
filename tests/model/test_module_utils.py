"""Small helpers for models: the mode of every module and its configs are put back."""

import pytest
from support.causal_models import tiny
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sft_pipeline.model.module_utils import restore_configs, use_eval_mode


def test_the_mode_is_put_back_after_an_error():
    model = tiny(LlamaConfig)
    model.model.norm.eval()
    with pytest.raises(KeyError), use_eval_mode(model):
        raise KeyError
    assert model.training and not model.model.norm.training


def test_configs_inside_configs_are_put_back_after_an_error():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision_config = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=8)
    config = LlavaConfig(vision_config=vision_config, text_config=LlamaConfig(**sizes, vocab_size=16))
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = None  # so that no module has the config
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    configs = (config, config.text_config, config.vision_config)
    attributes = [dict(vars(config)) for config in configs]
    with pytest.raises(KeyError), restore_configs(model):
        model.set_attn_implementation("flex_attention")
        assert {config._attn_implementation for config in configs} == {"flex_attention"}
        raise KeyError
    assert [vars(config) for config in configs] == attributes
    assert [config._attn_implementation for config in configs] == ["sdpa", "sdpa", "eager"]
