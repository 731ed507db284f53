"""Generation against transformers.generate one prompt at a time, and the documented behaviour of `generate`."""

from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.generation import (
    GREEDY,
    LLAMA,
    MODELS,
    POSITIONS,
    PROMPTS,
    SHAPE,
    VOCABULARY,
    decode,
    make_model,
    make_prompts,
)
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from sft_pipeline.inference import engine
from sft_pipeline.inference.engine import Completion, generate
from sft_pipeline.inference.kv_cache import KVCache
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.utils.errors import SFTError


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
