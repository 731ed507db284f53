"""Generate answers to a file of prompts, as rows that can be trained on.

    sft-pipeline generate prompts.txt --model outputs/quickstart --output answers.jsonl
    sft-pipeline generate alpaca.json --model outputs/quickstart --output four.jsonl --samples 4 --temperature 0.8

Each line of the output is a JSON object:

    messages        the conversation as the model saw it, system prompt included, and the answer, with its reasoning and
                    tool calls where the template writes such
    tools, chat_template_kwargs    of the prompt's row, if it has any
    origin          file and line of the prompt
    sample          number of the answer among those of the same prompt, from 0
    reference       the answer in the prompt's row as a message, if there was one
    finish_reason   "stop", or "length" if max_new_tokens cut the answer off
    tokens          length of the answer
    logprob         log-probability of the whole answer, in nats

An answer depends on its prompt, the numbers of prompt and sample, and the settings, not on the other prompts in its
batch. So the same command, run again, continues after an interruption (resumable_jsonl.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from sft_pipeline.commands.resumable_jsonl import AnswerFile, AnswerKey, AnswerRecord, check_output_file
from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.messages import add_system_prompt, replace_messages
from sft_pipeline.data.prompts import Prompt, load_prompts
from sft_pipeline.inference.answers import Answer, generate_answers
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.runs.trained_model import load_trained
from sft_pipeline.utils.errors import SFTError

logger = logging.getLogger(__name__)

HASHED_VALUES = 1024  # of each parameter; training changes all of them


@dataclass(frozen=True)
class GenerateOptions:
    """Input, output and settings of `generate_file`.

    samples: answers to each prompt. max_length: limit of prompt and answer together, in tokens. system_prompt: replaces
    the one that the model was trained with; a row's own system message has precedence over both. trust_remote_code,
    revision: as for `load_trained`.
    """

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
    trust_remote_code: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with the system prompt added, and its ids; no ids if `prompt.problem` says why it has no answer."""

    prompt: Prompt
    ids: list[int]


def generate_file(options: GenerateOptions) -> int:
    """Generate and write the answers to all prompts; return the number of prompts without one.

    FILE.errors has the reasons for those. Raises SFTError if no prompt can be answered: invalid options, prompts or a
    model that cannot be read, an output that exists.
    """
    _check_options(options)
    prompts = load_prompts(options.prompts)
    model, template, trained_system_prompt = load_trained(
        options.model, trust_remote_code=options.trust_remote_code, revision=options.revision
    )
    system_prompt = trained_system_prompt if options.system_prompt is None else options.system_prompt
    encoded = [_encode_prompt(prompt, template, system_prompt) for prompt in prompts]
    with closing(AnswerFile(options.output, _describe_settings(options, model, encoded), options.overwrite)) as file:
        keys = [(index, sample) for index in range(len(encoded)) for sample in range(options.samples)]
        if file.records:
            logger.info(
                "%s: continuing after %s of %s answers", file.partial, f"{len(file.records):,}", f"{len(keys):,}"
            )
        _generate_missing(options, model, template, encoded, [key for key in keys if key not in file.records], file)
        file.write_output()
    return _log_summary(options.output, list(file.records.values()))


def _check_options(options: GenerateOptions) -> None:
    counts = {"samples": options.samples, "batch_size": options.batch_size, "max_length": options.max_length}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise SFTError(f"{name}: {value} must be at least 1")
    if options.samples > 1 and not options.sampling.do_sample:
        raise SFTError(f"samples: {options.samples} greedy answers would be the same; add --temperature 1 to sample")
    if options.output.resolve() == Path(options.prompts).resolve():
        raise SFTError(f"output {options.output}: is the file of the prompts; choose another name")
    check_output_file(options.output, options.overwrite)


def _encode_prompt(prompt: Prompt, template: Template, system_prompt: str | None) -> EncodedPrompt:
    if prompt.problem:
        return EncodedPrompt(prompt, [])
    prompt = replace(prompt, conversation=add_system_prompt(prompt.conversation, system_prompt))
    try:
        return EncodedPrompt(prompt, template.encode_prompt(prompt.conversation))
    except SFTError as error:  # some chat templates reject a system message, or do not write tools
        return EncodedPrompt(replace(prompt, problem=str(error)), [])


def _describe_settings(
    options: GenerateOptions, model: PreTrainedModel, prompts: list[EncodedPrompt]
) -> dict[str, Any]:
    """Return everything that the answers depend on, up to fp32 rounding.

    The prompts' ids stand for template and tokenizer. batch_size is not among the settings: it changes no answer.
    """
    text = json.dumps([[asdict(encoded.prompt), encoded.ids] for encoded in prompts])
    return {
        "model": _hash_weights(model),
        "system_prompt": options.system_prompt,
        "prompts": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "samples": options.samples,
        "max_length": options.max_length,
        "stop_strings": options.stop_strings,
        **asdict(options.sampling),
    }


def _hash_weights(model: PreTrainedModel) -> str:
    """Hash the first HASHED_VALUES values of each parameter."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:HASHED_VALUES].float().cpu()
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _generate_missing(
    options: GenerateOptions,
    model: PreTrainedModel,
    template: Template,
    prompts: list[EncodedPrompt],
    keys: list[AnswerKey],
    file: AnswerFile,
) -> None:
    """Generate the answers with these keys and add each to the file when it is complete."""
    done_count, tokens, start = len(file.records), 0, time.monotonic()
    bar = tqdm(initial=done_count, total=done_count + len(keys), desc="answers", delay=0, dynamic_ncols=True)

    def add_answer(key: AnswerKey, answer: Answer) -> None:
        nonlocal tokens
        file.add(key, _build_record(prompts[key[0]].prompt, key[1], answer))
        tokens += answer.tokens
        bar.set_postfix_str(f"{tokens / max(time.monotonic() - start, 1e-9):.0f} tokens/s", refresh=False)
        bar.update()

    valid = [key for key in keys if not prompts[key[0]].prompt.problem]
    for key in sorted(set(keys) - set(valid)):
        add_answer(key, Answer("", False, 0, prompts[key[0]].prompt.problem))
    generate_answers(
        model,
        template,
        [prompts[index].ids for index, _ in valid],
        options.sampling,
        batch_size=options.batch_size,
        max_length=options.max_length,
        stop_strings=options.stop_strings,
        seeds=[compute_row_seed(options.sampling.seed, key) for key in valid],
        on_done=lambda row, answer: add_answer(valid[row], answer),
    )
    bar.close()


def compute_row_seed(seed: int, key: AnswerKey) -> int:
    """Return the seed of one answer, which depends on the run's seed, the prompt's number and the sample's alone."""
    digest = hashlib.blake2b(f"{seed} {key[0]} {key[1]}".encode(), digest_size=7)
    return int.from_bytes(digest.digest(), "big")


def _build_record(prompt: Prompt, sample: int, answer: Answer) -> AnswerRecord:
    """Build a line of the output or of the errors; an empty answer is an error, as it cannot be trained on."""
    source: AnswerRecord = {"origin": prompt.origin, "sample": sample}
    messages, message = prompt.conversation["messages"], answer.message
    if error := answer.error or _find_problem(answer):
        return {**source, "finish_reason": "error", "error": error, "prompt": messages}
    assert message is not None
    return {
        **replace_messages(prompt.conversation, [*messages, message]),
        **source,
        **({"reference": prompt.reference} if prompt.reference else {}),
        "finish_reason": "stop" if answer.stopped else "length",
        "tokens": answer.tokens,
        "logprob": round(answer.logprob, 4),
    }


def _find_problem(answer: Answer) -> str | None:
    """Return why an answer cannot be trained on, or None if it has a text or calls tools."""
    if answer.message and (answer.message["content"] or answer.message.get("tool_calls")):
        return None
    cause = "wrote its reasoning alone" if answer.text else "stopped at once"
    return f"the answer is empty: the model {cause}"


def _log_summary(output: Path, records: list[AnswerRecord]) -> int:
    """Log the number of answers; return the number of prompts without one."""
    reasons = [record["finish_reason"] for record in records]
    missing, cut = reasons.count("error"), reasons.count("length")
    line = f"{output}: {len(records) - missing:,} answers, {cut:,} of them cut off by max_new_tokens"
    logger.info(line + (f"; {missing:,} prompts got none, see {output}.errors" if missing else ""))
    return missing
