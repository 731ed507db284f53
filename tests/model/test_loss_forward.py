"""The model's two calls (loss for training, sums a row for evaluation) against transformers' own loss."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sft_pipeline.data.packing import pack_rows
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.model import loss_forward
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.packed_attention import use_packed_attention

IGNORED, VOCABULARY = -100, 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, bos_token_id=None, eos_token_id=None))


def llama_with_two_heads() -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.lm_head = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, VOCABULARY))
    return model


def bert() -> BertLMHeadModel:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return BertLMHeadModel(BertConfig(**sizes, num_attention_heads=4, is_decoder=True, initializer_range=0.3))


SPLIT = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "gpt2": gpt2,
}
WHOLE = {"two heads": (llama_with_two_heads, "no plain linear head"), "bert": (bert, "changes its logits")}


def make(maker) -> nn.Module:
    torch.manual_seed(0)
    return maker().eval()


def rows(seed: int = 1) -> list[dict[str, list[int]]]:
    """Rows with a common start, of uneven lengths and numbers of targets; the last has a single one."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for length, first in ((9, 5), (17, 8), (6, 4), (12, 11)):
        rest = torch.randint(4, VOCABULARY, (length - 4,), generator=random).tolist()
        ids = [1, 2, 3, 4, *rest]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (first - 1) + ids[first:] + [IGNORED]})
    return rows


def targets(batch: list[dict[str, list[int]]]) -> int:
    return sum(label != IGNORED for row in batch for label in row["labels"])


def ordinary_batch(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """What a user of plain transformers passes: padded ids, and labels at their own tokens' places."""
    padded = PaddingCollator(0)(batch)
    unshifted = torch.full_like(padded["labels"], IGNORED)
    unshifted[:, 1:] = padded["labels"][:, :-1]
    return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"], "labels": unshifted}


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def plain_sums(model: nn.Module, row: dict[str, list[int]]) -> list[float]:
    """nll, targets, hits of one row run alone, from the plain model's logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
    nll = count = hits = 0.0
    for index, label in enumerate(row["labels"]):
        if label != IGNORED:
            nll += (logits[index].logsumexp(-1) - logits[index, label]).item()
            count, hits = count + 1, hits + (logits[index].argmax().item() == label)
    return [nll, count, hits]


@pytest.mark.parametrize("name", [*SPLIT, *WHOLE])
def test_loss_and_gradients_are_those_of_transformers(name):
    """Both the mean and the sum over the step's targets, in value and in every parameter's gradient."""
    maker = SPLIT.get(name) or WHOLE[name][0]
    plain, ours = make(maker), make(maker)
    reason = patch_loss_forward(ours)
    assert (reason is None) == (name in SPLIT)
    for count in (None, 41):
        plain.zero_grad(), ours.zero_grad()
        expected = plain(**ordinary_batch(rows()), num_items_in_batch=count).loss
        loss = ours(**PaddingCollator(0)(rows()), num_items_in_batch=count).loss
        assert abs(loss.item() - expected.item()) < 1e-6 * max(1, expected.item())
        expected.backward(), loss.backward()
        assert gradients(ours)
        for ours_grad, plain_grad in zip(gradients(ours), gradients(plain), strict=True):
            torch.testing.assert_close(ours_grad, plain_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*SPLIT, "two heads"])
def test_packed_rows_give_the_padded_loss_and_gradients(name):
    """With shared prefixes computed once, also where the logits are computed at every position."""
    maker = SPLIT.get(name) or WHOLE[name][0]
    plain, ours = make(maker), make(maker)
    patch_loss_forward(ours)
    use_packed_attention(ours)
    batch = pack_rows(rows())
    assert batch["input_ids"].numel() == sum(len(row["input_ids"]) for row in rows()) - 3 * 4
    for count in (None, 41):
        plain.zero_grad(), ours.zero_grad()
        expected = plain(**ordinary_batch(rows()), num_items_in_batch=count).loss
        loss = ours(**batch, num_items_in_batch=count).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        expected.backward(), loss.backward()
        for ours_grad, plain_grad in zip(gradients(ours), gradients(plain), strict=True):
            torch.testing.assert_close(ours_grad, plain_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*SPLIT, *WHOLE])
@pytest.mark.parametrize("positions", [loss_forward.CHUNK_POSITIONS, 3])
def test_row_sums_are_those_of_each_row_alone(name, positions, monkeypatch):
    """Padded, and where the model can take them packed, with the positions at once or in chunks of three."""
    monkeypatch.setattr(loss_forward, "CHUNK_POSITIONS", positions)
    maker = SPLIT.get(name) or WHOLE[name][0]
    plain, ours = make(maker), make(maker)
    patch_loss_forward(ours)
    expected = torch.tensor([plain_sums(plain, row) for row in rows()], dtype=torch.float64)
    padded = ours(**PaddingCollator(0)(rows()), return_row_losses=True).logits
    assert padded.dtype == torch.float64 and padded.shape == (4, 3)
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=1e-4)
    if name == "bert":
        return
    use_packed_attention(ours)
    for share_prefixes in (True, False):
        packed = ours(**pack_rows(rows(), share_prefixes), return_row_losses=True).logits
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-4)
        assert torch.equal(packed[:, 1:], padded[:, 1:])


def test_parts_of_a_step_add_up():
    """The losses of micro-batches over the step's targets sum to the whole batch's loss."""
    model = make(SPLIT["llama"])
    patch_loss_forward(model)
    count = torch.tensor(targets(rows()))
    whole = model(**PaddingCollator(0)(rows()), num_items_in_batch=count).loss
    parts = [model(**PaddingCollator(0)([row]), num_items_in_batch=count).loss for row in rows()]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_an_unsplittable_head_says_why(name):
    maker, reason = WHOLE[name]
    assert reason in (patch_loss_forward(make(maker)) or "")


def test_without_shifted_labels_the_model_is_what_it_was():
    plain, ours = make(SPLIT["llama"]), make(SPLIT["llama"])
    patch_loss_forward(ours)
    batch = ordinary_batch(rows())
    assert torch.equal(ours(**batch).loss, plain(**batch).loss)
    labels = batch.pop("labels")
    assert labels is not None and torch.equal(ours(**batch).logits, plain(**batch).logits)
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_rows_without_a_target_sum_to_nothing():
    model = make(SPLIT["llama"])
    patch_loss_forward(model)
    row = {"input_ids": [1, 2, 3], "labels": [IGNORED] * 3}
    sums = model(**PaddingCollator(0)([row, rows()[0]]), return_row_losses=True).logits
    assert sums[0].tolist() == [0, 0, 0] and sums[1, 1] == targets(rows()[:1])
    use_packed_attention(model)
    for collate in (PaddingCollator(0), pack_rows):
        for count in (3, None):
            loss = model(**collate([row]), num_items_in_batch=count).loss
            loss.backward()
            assert loss.item() == 0 and gradients(model) and all(not g.any() for g in gradients(model))


def test_a_padded_batch_without_target_counts_has_a_row_in_each_line():
    model = make(SPLIT["llama"])
    patch_loss_forward(model)
    batch = PaddingCollator(0)(rows())
    expected = model(**batch, return_row_losses=True).logits
    del batch["target_counts"]
    assert torch.equal(model(**batch, return_row_losses=True).logits, expected)


def test_the_sums_of_a_row_are_those_of_its_sequences():
    model = make(SPLIT["llama"])
    patch_loss_forward(model)
    use_packed_attention(model)
    first, second, *rest = rows()
    joined = {key: first[key] + second[key] for key in first}
    joined["sequence_lengths"] = [len(first["input_ids"]), len(second["input_ids"])]
    single = model(**PaddingCollator(0)(rows()), return_row_losses=True).logits
    for collate in (PaddingCollator(0), pack_rows):
        sums = model(**collate([joined, *rest]), return_row_losses=True).logits
        torch.testing.assert_close(sums, torch.cat([single[:2].sum(0, keepdim=True), single[2:]]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("collate", [PaddingCollator(0), pack_rows], ids=["padded", "packed"])
def test_a_training_step_reads_nothing_back_from_the_device(name, collate):
    """Tensors without data raise where Python would need a value; on CUDA it would wait for one."""
    model = make(SPLIT[name])
    patch_loss_forward(model)
    use_packed_attention(model)
    batch = collate(rows())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {key: mode.from_tensor(value) if torch.is_tensor(value) else value for key, value in batch.items()}
        loss = model(**fakes, num_items_in_batch=mode.from_tensor(torch.tensor(41))).loss
    assert loss.shape == () and loss.requires_grad


def test_row_sums_do_not_keep_a_graph():
    model = make(SPLIT["gpt2"])
    patch_loss_forward(model)
    sums = model(**PaddingCollator(0)(rows()), return_row_losses=True).logits
    assert not sums.requires_grad and math.isfinite(sums.sum().item())


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_tied_embedding_gets_one_dense_gradient_over_an_accumulated_step(name):
    plain, ours = make(SPLIT[name]), make(SPLIT[name])
    patch_loss_forward(ours)
    for part in (rows()[:2], rows()[2:]):
        plain(**ordinary_batch(part), num_items_in_batch=41).loss.backward()
        ours(**PaddingCollator(0)(part), num_items_in_batch=41).loss.backward()
    actual, expected = (model.get_input_embeddings().weight.grad for model in (ours, plain))
    assert actual.layout == torch.strided and not ours.get_input_embeddings().sparse
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
