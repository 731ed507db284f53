"""Adapters by the key `peft`: each kind and field trains packed rows as peft trains padded ones, and is saved whole."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.trainers import VOCABULARY, make_rows
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

from sft_pipeline.arguments import SFTArguments
from sft_pipeline.config import SFTConfig
from sft_pipeline.data.packing import PackingCollator
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model.loading import load_model
from sft_pipeline.model.lora import add_adapters
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.peft_config import KINDS, REFUSED_FIELDS, build_peft_config, check_peft_config
from sft_pipeline.utils.errors import SFTError

# peft 0.21 still asks transformers 5.23 under the old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),  # by SHiRA
    pytest.mark.filterwarnings(
        "ignore:Failed to load the CUDA extension|Setting boft_n_butterfly:UserWarning"
    ),  # by BOFT
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*RMSNorm:UserWarning"),  # by LN tuning
]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
SMALL = {
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "MISS": {"r": 8},
    "SHIRA": {"r": 4},
    "C3A": {"block_size": 16},
    "ROAD": {"group_size": 8},
    "WAVEFT": {"n_frequency": 64},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
}
LORA_FIELDS = [
    {"use_dora": True},
    {"use_rslora": True, "r": 8},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "norm"]},
    {"bias": "all"},
    {"target_modules": "q_proj|lm_head"},
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 4}, "exclude_modules": ["o_proj"]},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": False},
    {"trainable_token_indices": [5, 6]},
    {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}},
]


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TOKENS, **SIZES, initializer_range=0.2))


def make_experts() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TOKENS, **SIZES, **EXPERTS, initializer_range=0.2))


def shift_weights(model) -> None:
    """Move every trainable weight, as adapters begin with zeros."""
    generator = torch.Generator().manual_seed(1)
    for _, weight in sorted(model.named_parameters()):
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)


def compute_grads(model, loss) -> dict[str, torch.Tensor]:
    loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert grads and all(grad is not None for grad in grads.values())
    return {name: grad.to_dense() for name, grad in grads.items()}


def check_exactness(make_model, keys: SFTArguments, folder):
    """Return the trained model; assert that packed rows give the loss and gradients of peft's model on padded ones, and
    that the saved adapters give its logits: by peft, and merged."""
    config = build_peft_config(keys)
    rows = [*make_rows([(3, 1), (2, 20), (5, 2), (1, 9)])]
    set_seed(0)
    expected = get_peft_model(make_model(), copy.deepcopy(config)).train()
    shift_weights(expected)
    batch = PaddingCollator(0, 8)(rows)
    logits = expected(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    expected_grads = compute_grads(expected, loss)

    set_seed(0)
    model = add_adapters(make_model(), config).train()
    shift_weights(model)
    patch_loss_forward(model)
    collator = PackingCollator(model, longest=40, share_prefixes=True)
    use_fused_layers(model)
    packed_loss = model(**collator(rows)).loss
    assert packed_loss.item() == pytest.approx(loss.item(), abs=2e-6)
    grads = compute_grads(model, packed_loss)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], atol=1e-5, rtol=1e-4, msg=name)

    base, ids = folder / "base", torch.arange(3, 12)[None]
    make_model().save_pretrained(base)
    model.save_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        by_peft = PeftModel.from_pretrained(make_model(), folder).eval()(input_ids=ids).logits
        config_file = folder / "adapter_config.json"
        config_file.write_text(
            config_file.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{base}"')
        )
        merged = load_model(str(folder)).eval()(input_ids=ids).logits
    assert torch.equal(by_peft, logits)
    torch.testing.assert_close(merged, logits, atol=2e-5, rtol=1e-4)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_train_each_kind_as_peft_does(kind, tmp_path):
    check_exactness(make_llama, SFTArguments(peft={"peft_type": kind, **SMALL.get(kind, {})}), tmp_path)


@pytest.mark.parametrize("fields", LORA_FIELDS, ids=str)
def test_packed_rows_train_each_field_of_lora_as_peft_does(fields, tmp_path):
    check_exactness(make_llama, SFTArguments(peft=fields), tmp_path)


def make_tied() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TOKENS, **SIZES, initializer_range=0.2, tie_word_embeddings=True))


@pytest.mark.parametrize("fields", [{}, {"trainable_token_indices": [5, 6]}], ids=str)
def test_tied_embeddings(fields, tmp_path):
    """The head is trained with the embeddings, and applied where there is a target alone."""
    model = check_exactness(make_tied, SFTArguments(lora=True, peft=fields), tmp_path)
    assert model.get_base_model().forward.head_obstacle is None


EXPERT_WEIGHTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


# peft gives gate_up_proj, which is two matrices, twice the rank, and then says that it did not.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("fields", [{}, {"target_parameters": EXPERT_WEIGHTS, "target_modules": ["q_proj"]}], ids=str)
def test_experts_are_trained(fields, tmp_path):
    keys = SFTArguments(lora=True) if not fields else SFTArguments(peft=fields)
    model = check_exactness(make_experts, keys, tmp_path)
    assert any("mlp.experts" in name for name, weight in model.named_parameters() if weight.requires_grad)


ERRORS = {
    "kind": ({"peft_type": "LORE"}, "peft: peft_type LORE is unknown; choose one of LORA, IA3"),
    "prompt": ({"peft_type": "PREFIX_TUNING"}, "peft: peft_type PREFIX_TUNING adds tokens to the inputs"),
    "loop": ({"peft_type": "ADALORA"}, "peft: peft_type ADALORA changes the ranks from within the training loop"),
    "untried": ({"peft_type": "PVERA"}, "peft: peft_type PVERA was not tried with packed rows; choose one of LORA"),
    "field": ({"use_dorra": True}, "peft: LoraConfig has no field use_dorra; it has alpha_pattern, bias, corda_config"),
    "type": ({"use_dora": "yes"}, "peft: use_dora is 'yes'; it has to be true or false"),
    "number": ({"r": True}, "peft: r is True; it has to be int"),
    "list": ({"modules_to_save": "lm_head"}, "peft: modules_to_save is 'lm_head'; it has to be list of text or none"),
    "word": ({"bias": "some"}, "peft: bias is 'some'; it has to be one of none, all, lora_only"),
    "run": ({"revision": "main"}, "peft: revision is set by the run; remove it"),
    "init": ({"init_lora_weights": "corda"}, "peft: init_lora_weights: corda is computed from rows; use true, pissa"),
    "kind's field": ({"peft_type": "IA3", "r": 4}, "peft: IA3Config has no field r; it has"),
}


@pytest.mark.parametrize(("fields", "message"), ERRORS.values(), ids=ERRORS)
def test_fields_that_are_wrong_are_refused_in_one_line(fields, message):
    with pytest.raises(SFTError) as error:
        build_peft_config(SFTArguments(peft=fields))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(("field", "reason"), REFUSED_FIELDS.items(), ids=REFUSED_FIELDS)
def test_fields_that_cannot_be_honoured_are_refused_also_from_python(field, reason):
    config = LoraConfig()
    setattr(config, field, True)
    with pytest.raises(SFTError, match=re.escape(f"peft: {field} {reason}; remove it")):
        check_peft_config(config)


def test_a_value_that_is_given_twice_is_refused():
    with pytest.raises(SFTError, match="lora_rank is the field r of peft; remove the key"):
        build_peft_config(SFTArguments(lora_rank=4, peft={"r": 8}))
    with pytest.raises(SFTError, match="lora_alpha is for LoRA, and peft_type is IA3; remove the key"):
        build_peft_config(SFTArguments(lora_alpha=4, peft={"peft_type": "IA3"}))
    config = build_peft_config(SFTArguments(lora_rank=4, peft={"use_dora": True, "lora_alpha": 5}))
    assert (config.r, config.lora_alpha, config.target_modules, config.use_dora) == (4, 5, "all-linear", True)


def test_the_key_is_a_mapping_or_json():
    assert SFTConfig(peft='{"use_dora": true}').peft == {"use_dora": True}
    with pytest.raises(SFTError, match="peft is 'dora'; it has to be {name: value}"):
        SFTConfig(peft='"dora"')
    with pytest.raises(SFTError, match="peft is not JSON"):
        SFTConfig(peft="use_dora")
    with pytest.raises(SFTError, match="peft: {} has no field; write lora: true"):
        SFTConfig(peft={})
    with pytest.raises(SFTError, match="peft and trainable_modules both select what is trained"):
        SFTConfig(peft={"use_dora": True}, trainable_modules=["norm"])
