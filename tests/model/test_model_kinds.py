"""The kinds of models of docs/models.md: loss and gradients of the library's own forward, or the refusal."""

import logging
import types

import pytest
import torch
from support.model_kinds import (
    ALIBI,
    CHANGED_SCORES,
    EXPERTS_PACKED,
    LINEAR_ATTENTION,
    LLAMA4,
    LONG,
    MASKED_WINDOWS,
    NOT_CAUSAL,
    ROUTER_LOSS,
    SHORT,
    WINDOWS,
    WITH_TOWERS,
    build_double_heads,
    build_llava,
    make,
)
from torch import nn

from sft_pipeline.data.collators import choose_collator
from sft_pipeline.data.packing import PackingCollator
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model.freezing import freeze_unreached
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.utils.errors import SFTError

IGNORED = -100


def make_rows() -> list[dict[str, list[int]]]:
    """Rows of at most 17 tokens with a common start, of uneven lengths and numbers of targets."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for length, first in ((9, 5), (17, 8), (6, 4), (12, 11)):
        ids = [1, 2, 3, 4, *torch.randint(4, 90, (length - 4,), generator=random).tolist()]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (first - 1) + ids[first:] + [IGNORED]})
    return rows


ROWS = make_rows()
TARGETS = sum(label != IGNORED for row in ROWS for label in row["labels"])


def compute_expected(model: nn.Module, num_items: int | None = TARGETS) -> torch.Tensor:
    """Compute the loss that plain transformers computes: padded ids, and labels that are not shifted."""
    batch = PaddingCollator(0)(ROWS)
    labels = torch.full_like(batch["labels"], IGNORED)
    labels[:, 1:] = batch["labels"][:, :-1]
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return model(**inputs, labels=labels, use_cache=False, **options).loss


def prepare(model: nn.Module) -> tuple[PackingCollator | PaddingCollator, str | None, str | None]:
    """Prepare the model as SFTTrainer does; return the collator, and why the head and the rows are as they are."""
    head_obstacle = patch_loss_forward(model)
    collator, packing_obstacle = choose_collator(model, max(len(row["input_ids"]) for row in ROWS), 0)
    freeze_unreached(model)
    if packing_obstacle is None:
        use_fused_layers(model)
    return collator, head_obstacle, packing_obstacle


def assert_same_step(build, num_items: int = TARGETS) -> tuple[str | None, str | None]:
    """Compare loss and every gradient with those of the library; return why head and rows are as they are."""
    plain, ours = make(build), make(build)
    collator, *obstacles = prepare(ours)
    expected, actual = compute_expected(plain, num_items), ours(**collator(ROWS), num_items_in_batch=num_items).loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    expected.backward(), actual.backward()
    compared = 0
    for (name, theirs), (_, own) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        if theirs.grad is None:
            assert own.grad is None or not own.grad.any(), name
            assert not own.requires_grad, f"{name} would have no gradient, for which DDP waits"
            continue
        scale = theirs.grad.abs().max().clamp_min(1e-3)
        assert (own.grad - theirs.grad).abs().max() <= 1e-3 * scale, name
        compared += 1
    assert compared > 8
    return tuple(obstacles)


@pytest.mark.parametrize("name", EXPERTS_PACKED)
def test_experts_are_packed(name):
    assert assert_same_step(EXPERTS_PACKED[name]) == (None, None)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("window", [LONG, SHORT], ids=["long", "short"])
def test_a_window_is_packed(name, window):
    assert assert_same_step(lambda: WINDOWS[name](window)) == (None, None)


@pytest.mark.parametrize("name", MASKED_WINDOWS)
def test_a_window_of_the_mask_alone_is_padded(name):
    head, rows = assert_same_step(MASKED_WINDOWS[name])
    assert head is None and "packing changes what" in rows


@pytest.mark.parametrize("name", CHANGED_SCORES)
def test_soft_capping_and_sinks_are_padded(name):
    head, rows = assert_same_step(CHANGED_SCORES[name])
    assert head is None and "changes its attention scores (soft-capping or sinks)" in rows


@pytest.mark.parametrize("name", LINEAR_ATTENTION)
def test_linear_attention_is_padded(name):
    head, rows = assert_same_step(LINEAR_ATTENTION[name])
    assert head is None and "does not use transformers' attention interface" in rows


@pytest.mark.parametrize("name", ALIBI)
def test_a_bias_of_the_scores_is_padded(name):
    head, rows = assert_same_step(ALIBI[name])
    assert head is None and "does not use transformers' attention interface" in rows


@pytest.mark.parametrize("name", LLAMA4)
def test_a_head_that_cannot_be_split_off_is_computed_everywhere(name):
    head, rows = assert_same_step(LLAMA4[name])
    assert "changes its logits after the head" in head and "does not accept packed rows" in rows


@pytest.mark.parametrize("name", ROUTER_LOSS)
def test_a_router_loss_is_added_to_the_padded_batch(name):
    head, rows = assert_same_step(ROUTER_LOSS[name])
    assert "adds a router loss" in head and "adds a router loss" in rows
    without = make(ROUTER_LOSS[name])
    without.config.output_router_logits = False
    assert compute_expected(make(ROUTER_LOSS[name])) - compute_expected(without) > 1e-3


@pytest.mark.parametrize("is_on", [True, False])
def test_a_router_loss_that_is_off_is_said(is_on, caplog):
    """It was off in silence, as in TRL until https://github.com/huggingface/trl/pull/6085."""
    model = make(ROUTER_LOSS["Mixtral"])
    model.config.output_router_logits = is_on
    with caplog.at_level(logging.INFO, logger="sft_pipeline"):
        patch_loss_forward(model)
    said = [m for m in caplog.messages if m.startswith("the router of the experts is trained without a loss")]
    assert len(said) == (not is_on)


def test_a_router_loss_is_weighted_by_the_targets_of_its_batch():
    """Of 2 * TARGETS in the step, the batch has a half: the library's loss for the batch alone counts by a half."""
    model = make(ROUTER_LOSS["Mixtral"])
    expected = compute_expected(model)
    collator, _, _ = prepare(model)
    assert model(**collator(ROWS), num_items_in_batch=2 * TARGETS).loss.item() == pytest.approx(expected.item() / 2)
    assert model(**collator(ROWS)).loss.item() == pytest.approx(expected.item())
    assert model(**collator([]), num_items_in_batch=TARGETS).loss.item() == 0


@pytest.mark.parametrize("name", WITH_TOWERS)
def test_towers_for_images_are_frozen_and_the_text_model_is_packed(name, caplog):
    build, modules = WITH_TOWERS[name]
    with caplog.at_level(logging.INFO, logger="sft_pipeline"):
        assert assert_same_step(build) == (None, None)
    [message] = [record.getMessage() for record in caplog.records if "do not reach" in record.getMessage()]
    assert message.startswith("frozen, as rows of text do not reach them: ") and message.endswith(f"({modules})")


def test_a_second_head_is_frozen_and_the_first_is_packed():
    assert assert_same_step(build_double_heads) == (None, None)
    model = make(build_double_heads)
    freeze_unreached(model)
    frozen = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"multiple_choice_head"}


def test_parameters_that_text_does_not_reach_cannot_be_trained_alone():
    model = make(build_llava)
    model.requires_grad_(False)
    model.model.vision_tower.requires_grad_(True)
    with pytest.raises(SFTError, match=r"^nothing to train: rows of text do not reach model\.vision_tower\."):
        freeze_unreached(model)


def test_a_loss_of_another_head_is_refused():
    """As a head that predicts the tokens after the next would add it."""
    model = make(lambda: WINDOWS["Mistral"](LONG))
    own_forward = model.forward

    def forward(self, labels=None, **kwargs):
        output = own_forward(labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 0.3 * output.logits.logsumexp(-1).mean()
        return output

    model.forward = types.MethodType(forward, model)
    with pytest.raises(
        SFTError, match="MistralForCausalLM: its own loss is not the cross-entropy of its logits"
    ) as error:
        patch_loss_forward(model)
    assert "\n" not in str(error.value)


def test_a_head_that_cannot_be_split_off_has_to_take_shifted_labels():
    model = make(lambda: WINDOWS["Mistral"](LONG))
    own_forward = model.forward
    model.lm_head = nn.Sequential(model.lm_head)
    model.forward = lambda input_ids, labels=None, use_cache=None: own_forward(input_ids=input_ids, labels=labels)
    with pytest.raises(SFTError, match="^MistralForCausalLM takes no shifted labels .*, and MistralForCausalLM has no"):
        patch_loss_forward(model)


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_model_that_is_not_causal_is_refused(name):
    build, message = NOT_CAUSAL[name]
    with pytest.raises(SFTError, match=message) as error:
        patch_loss_forward(make(build))
    assert "\n" not in str(error.value)
