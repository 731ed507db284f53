"""Small helpers for models: the mode of every module is put back."""

import pytest
from support.causal_models import tiny
from transformers import LlamaConfig

from sft_pipeline.model.module_utils import use_eval_mode


def test_the_mode_is_put_back_after_an_error():
    model = tiny(LlamaConfig)
    model.model.norm.eval()
    with pytest.raises(KeyError), use_eval_mode(model):
        raise KeyError
    assert model.training and not model.model.norm.training
