"""Generation against transformers.generate one prompt at a time, and the documented behaviour of `generate`."""

from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft_pipeline.inference import engine
from sft_pipeline.inference.engine import Completion, generate
from sft_pipeline.inference.kv_cache import KVCache, compute_bytes_per_token
from sft_pipeline.inference.prompt_lookup import PromptLookup
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.utils.errors import SFTError

VOCABULARY, POSITIONS = 61, 256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.4,  # wide, so that the tokens' logits lie apart and depend on what came before
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def make_gpt2() -> GPT2LMHeadModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.4, bos_token_id=None, eos_token_id=None))


MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gpt2": make_gpt2,
    "sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
}


def make_model(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MAKERS[name]()
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide a mistake in them
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


MODELS = {name: make_model(name) for name in MAKERS}
LLAMA = MODELS["llama"]
GREEDY = SamplingParams(max_new_tokens=12)


def generate_with_transformers(
    model: nn.Module, prompt: list[int], stop_ids: list[int], new: int, **kwargs: object
) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=stop_ids or None,
        pad_token_id=0,
        **kwargs,
    )
    answer = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer[-1] in stop_ids else answer


def is_tied(model: nn.Module, prompt: list[int], answer: list[int], expected: list[int]) -> bool:
    """Whether the logits of the first differing tokens are within 1e-5, so that rounding decides between them."""
    index = next((i for i, (a, b) in enumerate(zip(answer, expected)) if a != b), None)
    if index is None:
        return False
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer[:index]])).logits[0, -1]
    return bool((logits[answer[index]] - logits[expected[index]]).abs() < 1e-5)


def make_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = make_prompts(3, 17, 1, 40, 8, 2, 25, 9)
PROMPT_LISTS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=24), min_size=1, max_size=7)


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=8)
@given(
    prompts=PROMPT_LISTS,
    prefix=st.lists(st.integers(0, VOCABULARY - 1), max_size=8),
    batch_size=st.integers(1, 5),
    stop_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=6, unique=True),
)
def test_greedy_is_transformers_one_prompt_at_a_time(name, prompts, prefix, batch_size, stop_ids):
    model, prompts = MODELS[name], [prefix + prompt for prompt in prompts]
    completions = generate(model, prompts, stop_ids, GREEDY, batch_size=batch_size)
    for prompt, completion in zip(prompts, completions):
        expected = generate_with_transformers(model, prompt, stop_ids, GREEDY.max_new_tokens)
        assert completion.ids == expected or is_tied(model, prompt, completion.ids, expected)
        assert completion.finish_reason == ("length" if len(completion.ids) == GREEDY.max_new_tokens else "stop")


@pytest.mark.parametrize("name", MODELS)
def test_long_prompts_are_read_in_pieces_beside_the_others(name, monkeypatch):
    monkeypatch.setattr(engine, "MAX_PROMPT_TOKENS_PER_STEP", 16)
    for prompts in (PROMPTS, [PROMPTS[3] + prompt for prompt in PROMPTS]):
        completions = generate(MODELS[name], prompts, [], SamplingParams(max_new_tokens=70), batch_size=3)
        assert [c.ids for c in completions] == [generate_with_transformers(MODELS[name], p, [], 70) for p in prompts]


def test_a_long_prompt_read_in_pieces_draws_the_same(monkeypatch):
    chosen = SamplingParams(max_new_tokens=9, do_sample=True, repetition_penalty=1.2)
    whole = generate(LLAMA, PROMPTS[3:4], [], chosen)
    monkeypatch.setattr(engine, "MAX_PROMPT_TOKENS_PER_STEP", 16)
    assert generate(LLAMA, PROMPTS[3:4], [], chosen)[0].ids == whole[0].ids


def test_repetition_penalty_is_that_of_transformers():
    completions = generate(LLAMA, PROMPTS, [], SamplingParams(max_new_tokens=30, repetition_penalty=1.5), batch_size=3)
    assert [c.ids for c in completions] == [
        generate_with_transformers(LLAMA, p, [], 30, repetition_penalty=1.5) for p in PROMPTS
    ]


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_one_forward(name):
    model = MODELS[name]
    for prompt, completion in zip(PROMPTS, generate(model, PROMPTS, [], GREEDY, batch_size=3)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_sampled_rows_do_not_depend_on_their_neighbours():
    chosen = SamplingParams(max_new_tokens=20, do_sample=True, temperature=1.3, top_k=0, seed=5)
    answers = [c.ids for c in generate(LLAMA, PROMPTS, [7], chosen, batch_size=8)]
    assert answers == [c.ids for c in generate(LLAMA, PROMPTS, [7], chosen, batch_size=3)]
    assert answers == [generate(LLAMA, [p], [7], chosen, seeds=[5 + i])[0].ids for i, p in enumerate(PROMPTS)]
    backwards = generate(LLAMA, PROMPTS[::-1], [7], chosen, seeds=[12, 11, 10, 9, 8, 7, 6, 5], batch_size=2)
    assert answers == [c.ids for c in backwards][::-1]


def test_one_prompt_many_samples():
    chosen = SamplingParams(max_new_tokens=20, do_sample=True, temperature=2.0)
    answers = [tuple(c.ids) for c in generate(LLAMA, [PROMPTS[1]] * 6, [], chosen, batch_size=4)]
    assert len(set(answers)) == 6


def test_bad_prompts_fail_alone_and_order_is_kept():
    prompts = [PROMPTS[0], [], [1] * 250, PROMPTS[1], [3, VOCABULARY], [-1], [1] * 600, PROMPTS[2]]
    done: dict[int, Completion] = {}
    completions = generate(LLAMA, prompts, [], GREEDY, batch_size=2, on_done=done.__setitem__)
    assert [c.finish_reason == "error" for c in completions] == [False, True, True, False, True, True, True, False]
    for i in (0, 3, 7):
        assert completions[i].ids == generate_with_transformers(LLAMA, prompts[i], [], GREEDY.max_new_tokens)
    assert completions[1].error == "the prompt is empty: give at least one token"
    assert completions[2].error == (
        "250 prompt tokens and 12 new tokens exceed the limit of 256: shorten the prompt or reduce max_new_tokens"
    )
    assert "outside the model's vocabulary of 61" in completions[4].error
    assert done == dict(enumerate(completions))


def test_max_length_limits_a_row():
    assert [c.finish_reason for c in generate(LLAMA, PROMPTS[:2], [], GREEDY, max_length=20)] == ["length", "error"]


def test_no_prompts_and_only_bad_prompts():
    assert generate(LLAMA, [], [], GREEDY) == []
    assert generate(LLAMA, [[]], [], GREEDY)[0].finish_reason == "error"


def decode(ids: list[int]) -> str:
    """A vocabulary of one letter an id, and two for the last ids."""
    return "".join(chr(97 + i) if i < 26 else chr(65 + i % 26) + "." for i in ids)


def test_stop_strings():
    plain = generate(LLAMA, PROMPTS, [], SamplingParams(max_new_tokens=30), decode=decode, batch_size=3)
    assert [c.text for c in plain] == [decode(c.ids) for c in plain]
    stop = plain[1].text[4:7]
    stopped = generate(
        LLAMA, PROMPTS, [], SamplingParams(max_new_tokens=30), decode=decode, stop_strings=[stop, "never"], batch_size=3
    )
    for full, cut in zip(plain, stopped):
        assert cut.text == full.text.partition(stop)[0]
        assert cut.finish_reason == ("stop" if stop in full.text else "length")
        assert stop not in decode(cut.ids[:-1]) and cut.ids == full.ids[: len(cut.ids)]
    assert "stop" in [c.finish_reason for c in stopped]


def test_callbacks_stream_every_token_and_every_completion_once():
    streamed: dict[int, list[int]] = {i: [] for i in range(len(PROMPTS))}
    done: list[tuple[int, Completion]] = []
    completions = generate(
        LLAMA, PROMPTS, [3, 9, 20], GREEDY, batch_size=3,
        on_token=lambda row, token: streamed[row].append(token), on_done=lambda row, c: done.append((row, c)),
    )  # fmt: skip
    assert list(streamed.values()) == [c.ids for c in completions]
    assert sorted(done, key=lambda pair: pair[0]) == list(enumerate(completions))


def count_forwards(model: nn.Module, **kwargs: object) -> list[torch.Size]:
    shapes: list[torch.Size] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    generate(model, **kwargs)
    handle.remove()
    return shapes


def test_the_batch_stays_full_and_holds_no_padding(monkeypatch):
    """Six prompts in three slots: while prompts wait, every forward has three sequences, and each token is computed
    once (without drafts, as rejected ones would be computed too)."""
    monkeypatch.setattr(engine, "MAX_DRAFT_TOKENS_PER_STEP", 0)
    lengths = [5, 30, 5, 5, 5, 5]
    shapes = count_forwards(
        LLAMA, prompts=make_prompts(*lengths), stop_ids=[], settings=SamplingParams(max_new_tokens=10), batch_size=3
    )
    assert len(shapes) == 2 * 10
    assert sum(tokens for _, tokens in shapes) == sum(lengths) + 6 * 9


def test_the_common_prefix_is_read_once():
    prefix = PROMPTS[3]
    prompts = [[*prefix, i, i + 1] for i in range(6)]
    shapes = count_forwards(
        LLAMA, prompts=prompts, stop_ids=[], settings=SamplingParams(max_new_tokens=1), batch_size=2
    )
    assert sum(tokens for _, tokens in shapes) == len(prefix) + 6 * 2


def make_looping_model(name: str) -> nn.Module:
    """A model whose next token depends mostly on the last one, so that its answers run into loops."""
    model = deepcopy(MODELS[name])
    for parameter_name, parameter in model.named_parameters():
        if "o_proj.weight" in parameter_name or "attn.c_proj.weight" in parameter_name:
            parameter.data *= 0.01
    return model


LOOPING_MODELS = {name: make_looping_model(name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 3}, {"repetition_penalty": 1.2}])
def test_drafts_change_only_the_number_of_forwards(name, sampling, monkeypatch):
    model, prompts = LOOPING_MODELS[name], [PROMPTS[1], PROMPTS[4], PROMPTS[3] * 3, PROMPTS[5]]
    settings = SamplingParams(max_new_tokens=60, **sampling)
    run = partial(generate, model, prompts, [7], settings, batch_size=3)
    count = partial(count_forwards, model, prompts=prompts, stop_ids=[], settings=settings, batch_size=1)
    with_drafts, forwards = run(), len(count())
    monkeypatch.setattr(engine, "MAX_DRAFT_TOKENS_PER_STEP", 0)
    expected = run()
    assert [(c.ids, c.finish_reason) for c in with_drafts] == [(c.ids, c.finish_reason) for c in expected]
    for completion, reference in zip(with_drafts, expected):
        assert completion.logprobs == pytest.approx(reference.logprobs, abs=1e-4)
    if not sampling:
        assert forwards < len(count())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_is_read_past_the_models_last_position(name):
    prompt = (PROMPTS[3] * POSITIONS)[: POSITIONS - 20]
    [completion] = generate(MODELS[name], [prompt], stop_ids=[], settings=SamplingParams(max_new_tokens=20))
    assert completion.ids == generate_with_transformers(MODELS[name], prompt, [], 20)


def test_an_answer_ends_within_its_drafts():
    """At a stop id and at the limit: the drafts after the end are not part of the answer."""
    prompt, model = PROMPTS[1], LOOPING_MODELS["llama"]
    [whole] = generate(model, [prompt], [], SamplingParams(max_new_tokens=40))
    for end in range(1, 40):
        [cut] = generate(model, [prompt], [], SamplingParams(max_new_tokens=end))
        assert (cut.ids, cut.finish_reason) == (whole.ids[:end], "length")
    late = [token for token in set(whole.ids) if whole.ids.index(token) > 8]
    for token in late:
        [stopped] = generate(model, [prompt], [token], SamplingParams(max_new_tokens=40))
        assert (stopped.ids, stopped.finish_reason) == (whole.ids[: whole.ids.index(token)], "stop")
    shown: list[int] = []
    text = decode(whole.ids[30:33])
    [stopped] = generate(
        model, [prompt], [], SamplingParams(max_new_tokens=40), stop_strings=[text], decode=decode,
        on_token=lambda _, token: shown.append(token),
    )  # fmt: skip
    assert stopped.ids == shown == whole.ids[: len(shown)] and stopped.text == decode(whole.ids).split(text)[0]


@given(
    ids=st.lists(st.integers(0, 2), max_size=30),
    limit=st.integers(-1, 20),
    num_tokens=st.integers(1, 20),
    num_draft_tokens=st.integers(1, 16),
)
def test_drafts_are_the_tokens_after_the_latest_matching_ngram(ids, limit, num_tokens, num_draft_tokens):
    lookup = PromptLookup(ids)
    lookup.num_draft_tokens = num_draft_tokens
    expected: list[int] = []
    for size in range(4, (1 if num_tokens < 8 else 2 if num_tokens < 16 else 4) - 1, -1):
        matches = [end for end in range(size, len(ids)) if ids[end - size : end] == ids[-size:]]
        if matches:
            expected = (ids[matches[-1] :] * 20)[: max(min(limit, num_draft_tokens), 0)]
            break
    assert lookup.get_draft_tokens(limit, num_tokens) == expected


def test_accepted_drafts_raise_their_number_and_rejected_drafts_lower_it():
    lookup, counts = PromptLookup([1]), []
    for proposed, accepted in [(2, 2), (4, 4), (8, 8), (16, 16), (16, 5), (0, 0), (5, 0)]:
        lookup.update_num_draft_tokens(proposed, accepted)
        counts.append(lookup.num_draft_tokens)
    assert counts == [4, 8, 16, 16, 5, 5, 1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_is_left_as_it_was(name):
    model = make_model(name).train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.Embedding)).eval()
    state = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    config, random_state = model.config.to_dict(), torch.get_rng_state()
    attributes = [set(vars(module)) for module in model.modules()]
    generate(model, PROMPTS, [1], SamplingParams(max_new_tokens=5, do_sample=True), batch_size=3)
    assert all(module.training != (module is frozen) for module in model.modules())
    assert model.config.to_dict() == config and model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert "sft_generation" not in ALL_ATTENTION_FUNCTIONS
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_training_after_generation_is_bitwise_the_same():
    def gradients(generating: bool) -> list[torch.Tensor]:
        model = make_model("llama").train()
        if generating:
            generate(model, PROMPTS, [], GREEDY)
        ids = torch.tensor([PROMPTS[3]])
        model(ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False)))


def test_the_model_is_restored_after_an_error():
    model = make_model("llama").train()
    attributes = [set(vars(module)) for module in model.modules()]

    def interrupt(row: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, [], GREEDY, on_token=interrupt)
    assert model.training and model.config._attn_implementation == "sdpa" and torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_gradient_checkpointing_does_not_matter():
    model = make_model("llama").train()
    model.activation_checkpointing_enable()
    assert [c.ids for c in generate(model, PROMPTS, [], GREEDY)] == [
        c.ids for c in generate(LLAMA, PROMPTS, [], GREEDY)
    ]
    assert model.is_activation_checkpointing


def test_half_precision_and_hooked_layers_are_supported():
    model = make_model("llama").to(torch.bfloat16)
    assert all(len(c.ids) == 12 for c in generate(model, PROMPTS, [], GREEDY, batch_size=3))
    hooked, calls = make_model("llama"), []
    hooked.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    expected = generate(LLAMA, PROMPTS[:1], [], GREEDY)[0].ids
    assert generate(hooked, PROMPTS[:1], [], GREEDY)[0].ids == expected
    assert len(calls) == GREEDY.max_new_tokens


def test_autocast_is_followed():
    with torch.autocast("cpu", torch.bfloat16):
        completions = generate(LLAMA, PROMPTS, [], GREEDY, batch_size=3)
    assert all(len(c.ids) == 12 for c in completions)


def test_memory_of_a_row():
    cache = KVCache(3)
    cache.capacity = 64
    key = torch.zeros(1, 2, 5, 8)
    for layer in range(2):
        cache.prepare([0, 0, 0], [1, 1, 3], torch.device("cpu"))
        cache._write(layer, key, key)
    total = sum(tensor.nbytes for pair in cache.layers.values() for tensor in pair)
    assert total == 3 * 64 * compute_bytes_per_token(layers=2, key_value_heads=2, head_dim=8)
    assert compute_bytes_per_token(30, 3, 64) == 46_080


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
        ({"stop_strings": ["a"]}, "stop_strings: need decode"),
        ({"stop_strings": "a", "decode": decode}, "stop_strings: give a list"),
        ({"stop_strings": [""], "decode": decode}, "stop_strings: give a list"),
        ({"seeds": [1]}, "seeds: got 1 for 8 prompts"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(SFTError, match=message):
        generate(LLAMA, PROMPTS, [], GREEDY, **arguments)


def test_unsupported_models_are_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(SFTError, match="MambaForCausalLM: generation supports only decoder models"):
        generate(mamba, PROMPTS, [], GREEDY)
    softcapped = Gemma2ForCausalLM(Gemma2Config(**SHAPE))
    with pytest.raises(SFTError, match="does not support attention with .'softcap'"):
        generate(softcapped, PROMPTS, [], GREEDY)
    assert softcapped.config._attn_implementation != "sft_generation"


def test_a_layer_that_does_not_attend_is_refused():
    model = make_model("llama")
    config = SimpleNamespace(num_hidden_layers=3)
    with pytest.raises(SFTError, match=r"layers \[2\] keep a state"):
        engine._check_layers(
            SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config)), _fill_cache(model)
        )


def _fill_cache(model: nn.Module) -> KVCache:
    cache = KVCache(1)
    with engine.use_inference_mode(model, cache.attend):
        plan = cache.prepare([0], [2], torch.device("cpu"))
        model(input_ids=torch.tensor([[1, 2]]), position_ids=plan.positions[None], use_cache=False)
    return cache
