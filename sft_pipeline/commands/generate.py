"""Answer a file of prompts; the answers are rows to train on.

    sft-pipeline generate prompts.txt --model outputs/quickstart --output answers.jsonl
    sft-pipeline generate alpaca.json --model outputs/quickstart --output four.jsonl --samples 4 --temperature 0.8

A line of the output holds `messages` as the model saw them, system prompt included, with its answer behind them, then
`origin` (the prompt's place), `reference` (the answer that stood in the row, if one did), `sample`, `finish_reason`
("stop", or "length" for an answer that was cut off), `tokens` and `logprob` (of the whole answer, in nats). What a
prompt is answered depends on the prompt, its number and the settings, not on its neighbours; so the same command goes
on where it was cut off, see resumable_jsonl.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from sft_pipeline.commands.resumable_jsonl import AnswerFile, AnswerKey, AnswerRecord, check_output_file
from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.messages import add_system_prompt
from sft_pipeline.data.prompts import Prompt, load_prompts
from sft_pipeline.inference.answers import Answer, generate_answers
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.runs.trained_model import load_trained
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

FINGERPRINT_VALUES = 1024  # of each parameter: training moves them all


@dataclass(frozen=True)
class GenerateOptions:
    """What to answer, how, and where to. `samples` answers to each prompt; `system_prompt` stands in for the one the
    model was trained with, and rows keep their own; `max_length` bounds prompt and answer together, in tokens."""

    prompts: str
    model: str
    output: Path
    sampling: SamplingParams
    samples: int = 1
    batch_size: int = 16
    max_length: int | None = None
    stop_strings: tuple[str, ...] = ()
    system_prompt: str | None = None
    overwrite: bool = False


def generate_file(request: GenerateOptions) -> int:
    """Answer all prompts and write the answers; returns how many are missing, for which FILE.errors has the reason.

    Raises SFTError for what concerns all of them: prompts or model that can't be read, output that is taken, options.
    """
    _check(request)
    asked = load_prompts(request.prompts)
    model, template, trained_with = load_trained(request.model)
    system_prompt = trained_with if request.system_prompt is None else request.system_prompt
    prompts = [_encode_prompt(prompt, template, system_prompt) for prompt in asked]
    with closing(AnswerFile(request.output, _describe_settings(request, model, prompts), request.overwrite)) as file:
        keys = [(at, sample) for at in range(len(prompts)) for sample in range(request.samples)]
        if file.done:
            logger.info("%s: goes on after %s of %s answers", file.partial, f"{len(file.done):,}", f"{len(keys):,}")
        _answer(request, model, template, prompts, [key for key in keys if key not in file.done], file)
        file.finish()
    return _report(request.output, list(file.done.values()))


def _check(request: GenerateOptions) -> None:
    counts = {"samples": request.samples, "batch_size": request.batch_size, "max_length": request.max_length}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise SFTError(f"{name}: {value} must be at least 1")
    if request.samples > 1 and not request.sampling.do_sample:
        raise SFTError(f"samples: {request.samples} greedy answers would be the same; add --temperature 1 to draw them")
    if request.output.resolve() == Path(request.prompts).resolve():
        raise SFTError(f"output {request.output}: is the file of the prompts; choose another name")
    check_output_file(request.output, request.overwrite)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model sees it; one with a problem has no ids."""

    prompt: Prompt
    ids: list[int]


def _encode_prompt(prompt: Prompt, template: Template, system_prompt: str | None) -> EncodedPrompt:
    if prompt.problem:
        return EncodedPrompt(prompt, [])
    messages = add_system_prompt(prompt.messages, system_prompt)
    try:
        return EncodedPrompt(Prompt(prompt.origin, messages, prompt.reference), template.encode_prompt(messages))
    except SFTError as error:  # some chat templates refuse a system message
        return EncodedPrompt(Prompt(prompt.origin, messages, problem=str(error)), [])


def _describe_settings(
    request: GenerateOptions, model: PreTrainedModel, prompts: list[EncodedPrompt]
) -> dict[str, Any]:
    """All that the answers depend on, up to the rounding of fp32. The ids hold template and tokenizer too."""
    text = json.dumps([[asdict(ready.prompt), ready.ids] for ready in prompts])
    return {
        "model": _hash_weights(model),
        "system_prompt": request.system_prompt,
        "prompts": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "samples": request.samples,
        "max_length": request.max_length,
        "stop_strings": request.stop_strings,
        **asdict(request.sampling),
    }


def _hash_weights(model: PreTrainedModel) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:FINGERPRINT_VALUES].float().cpu()
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _answer(
    request: GenerateOptions,
    model: PreTrainedModel,
    template: Template,
    prompts: list[EncodedPrompt],
    keys: list[AnswerKey],
    file: AnswerFile,
) -> None:
    """Answer the prompts of `keys` into the file."""
    done, tokens, started = len(file.done), 0, time.monotonic()
    bar = tqdm(initial=done, total=done + len(keys), desc="answers", delay=0, dynamic_ncols=True)

    def keep(key: AnswerKey, answer: Answer) -> None:
        nonlocal tokens
        file.add(key, _build_record(prompts[key[0]].prompt, key[1], answer))
        tokens += answer.tokens
        bar.set_postfix_str(f"{tokens / max(time.monotonic() - started, 1e-9):.0f} tokens/s", refresh=False)
        bar.update()

    good = [key for key in keys if not prompts[key[0]].prompt.problem]
    for key in sorted(set(keys) - set(good)):
        keep(key, Answer("", False, 0, prompts[key[0]].prompt.problem))
    generate_answers(
        model,
        template,
        [prompts[prompt].ids for prompt, _ in good],
        request.sampling,
        batch_size=request.batch_size,
        max_length=request.max_length,
        stop_strings=request.stop_strings,
        seeds=[compute_row_seed(request.sampling.seed, key) for key in good],
        on_done=lambda at, answer: keep(good[at], answer),
    )
    bar.close()


def compute_row_seed(seed: int, key: AnswerKey) -> int:
    """The seed of one answer: of the run's, the prompt's number and the sample's, and of nothing else."""
    digest = hashlib.blake2b(f"{seed} {key[0]} {key[1]}".encode(), digest_size=7)
    return int.from_bytes(digest.digest(), "big")


def _build_record(prompt: Prompt, sample: int, answer: Answer) -> AnswerRecord:
    """A line of the output, or of the errors. An empty answer is an error, for nobody could train on it."""
    error = answer.error or (None if answer.text else "the answer is empty: the model stopped at once")
    place: AnswerRecord = {"origin": prompt.origin, "sample": sample}
    if error:
        return {**place, "finish_reason": "error", "error": error, "prompt": prompt.messages}
    return {
        "messages": [*prompt.messages, {"role": "assistant", "content": answer.text}],
        **place,
        **({"reference": prompt.reference} if prompt.reference else {}),
        "finish_reason": "stop" if answer.stopped else "length",
        "tokens": answer.tokens,
        "logprob": round(answer.logprob, 4),
    }


def _report(output: Path, rows: list[AnswerRecord]) -> int:
    reasons = [row["finish_reason"] for row in rows]
    missing, cut = reasons.count("error"), reasons.count("length")
    line = f"{output}: {len(rows) - missing:,} answers, {cut:,} of them cut off by max_new_tokens"
    logger.info(line + (f"; {missing:,} prompts got none, see {output}.errors" if missing else ""))
    return missing
