"""Random conversations from messages to gradients: the tree of their sequences against the padded batch of them.

With tools, reasoning and messages that are not trained; with a template that leaves out the reasoning of earlier
answers and with one that keeps it.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.causal_models import tiny
from support.templates import AGENT_TEMPLATE
from support.tiny import build_tokenizer
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from sft_pipeline.data.chat_templates import build_template
from sft_pipeline.data.encode import Encoder
from sft_pipeline.data.messages import format_conversation
from sft_pipeline.data.packing import pack_rows
from sft_pipeline.data.padding import PaddingCollator
from sft_pipeline.kernels.cpu_layer_training import use_fused_layers
from sft_pipeline.model.loss_forward import patch_loss_forward
from sft_pipeline.model.packed_attention import use_packed_attention

KEEPING_TEMPLATE = AGENT_TEMPLATE.replace("and loop.index0 > ns.last_user", "")
TOKENIZER = build_tokenizer()
POSITIONS = {"max_position_embeddings": 4096}
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_positions": 4096}
MODELS = {
    "Llama": tiny(LlamaConfig, vocab_size=len(TOKENIZER), **POSITIONS),
    "Qwen3": tiny(Qwen3Config, vocab_size=len(TOKENIZER), **POSITIONS),
    "GPT-2": tiny(GPT2Config, vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4, **DRY),
}
for model in MODELS.values():
    patch_loss_forward(model)
    use_packed_attention(model)
    use_fused_layers(model)  # of Llama and Qwen3

WORDS = st.sampled_from(["the answer", "is in", "the text", "冬瓜", "<|im_end|>", "no", "<think>"])
TEXTS = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
FLAGS = st.sampled_from([{}, {}, {"train": False}])
REASONING = st.one_of(st.just({}), TEXTS.map(lambda text: {"reasoning_content": text}))
TOOL = {"type": "function", "function": {"name": "find", "description": "Find a text.", "parameters": {}}}


@st.composite
def exchanges(draw):
    """A user's message, perhaps a call with its result, and the answer."""
    messages = [{"role": "user", "content": draw(TEXTS)}]
    if draw(st.booleans()):
        call = {"type": "function", "function": {"name": "find", "arguments": {"text": draw(TEXTS)}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call], **draw(REASONING), **draw(FLAGS)})
        messages.append({"role": "tool", "content": draw(TEXTS)})
    return [*messages, {"role": "assistant", "content": draw(TEXTS), **draw(REASONING), **draw(FLAGS)}]


@st.composite
def conversations(draw):
    """One to four exchanges, half of them with the system message that others have too, and a tool or none."""
    system = [{"role": "system", "content": "the question is in the text"}] if draw(st.booleans()) else []
    turns = [message for exchange in draw(st.lists(exchanges(), min_size=1, max_size=4)) for message in exchange]
    return {"messages": system + turns, "tools": [TOOL]}


def encode(drawn, chat_template):
    """Encode conversations as rows; those without a trained answer are left out."""
    TOKENIZER.chat_template = chat_template
    encoder = Encoder(build_template("chat", TOKENIZER), max_length=4000)
    columns = encoder({"conversation": list(map(format_conversation, drawn)), "origin": ["row"] * len(drawn)})
    return [row for row in (dict(zip(columns, values)) for values in zip(*columns.values())) if row["input_ids"]]


def run(model, batch):
    """Return the loss of a batch, every parameter's gradient, and the sums of each row."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=7).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, model(**batch, return_row_losses=True).logits[:, :2]


@pytest.mark.parametrize("chat_template", [AGENT_TEMPLATE, KEEPING_TEMPLATE], ids=["strips", "keeps"])
@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(conversations(), min_size=1, max_size=3))
def test_conversations_have_the_loss_and_gradients_of_the_padded_batch(name, chat_template, drawn):
    rows, model = encode(drawn, chat_template), MODELS[name]
    if not rows:
        return
    trained = [m for c in drawn for m in c["messages"] if m["role"] == "assistant" and m.get("train", True)]
    targets = sum(label == TOKENIZER.eos_token_id for row in rows for label in row["labels"])
    assert targets == len(trained), "each answer's stop token is a target exactly once"
    loss, grads, sums = run(model, pack_rows(rows))
    expected_loss, expected_grads, expected_sums = run(model, PaddingCollator(0)(rows))
    assert abs(loss - expected_loss) <= 1e-5 * max(1.0, expected_loss.item())
    assert grads.keys() == expected_grads.keys()
    for parameter, grad in expected_grads.items():
        assert (grads[parameter] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp_min(1e-3), parameter
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)


def test_a_template_that_keeps_reasoning_gives_one_sequence_and_one_that_strips_it_one_for_each_exchange():
    messages = []
    for text in ("no", "the text", "the answer"):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": text, "reasoning_content": "is in"})
    [kept], [stripped] = (encode([{"messages": messages}], name) for name in (KEEPING_TEMPLATE, AGENT_TEMPLATE))
    assert len(kept["sequence_lengths"]) == 1 and len(stripped["sequence_lengths"]) == 3
    assert stripped["computed_tokens"] < sum(stripped["sequence_lengths"])
