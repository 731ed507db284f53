"""Compare generation with `transformers.generate`, in turn: ours, theirs, ours, theirs, ...

    python benchmarks/generate.py outputs/quickstart alpaca_en_demo.json --output docs/generation
    python benchmarks/generate.py outputs/quickstart alpaca_en_demo.json --check 200

The model is a run's output folder, so that answers end with the stop token; the data gives the prompts. Measured are
one prompt at a time with a fixed number of tokens, and 64 prompts of mixed lengths in batches of 16 and 64, which
`transformers.generate` pads on the left and holds until the longest answer ends. --check N compares the tokens of N
answers with those of `transformers.generate` one prompt at a time, and counts where they differ: at a tie (two logits
within 1e-5, where rounding decides) or elsewhere. --output writes OUTPUT.json and OUTPUT.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sft_pipeline.data.messages import add_system_prompt
from sft_pipeline.data.prompts import load_prompts
from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.kv_cache import compute_bytes_per_token
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.runs.trained_model import load_trained

Ids = list[list[int]]
BATCH_SIZES, PROMPTS, TIE = (16, 64), 64, 1e-5


class Comparison:
    """Answer prompts' ids greedily with one model in both ways; answers come without the stop token."""

    model: Any  # with the methods of transformers' GenerationMixin

    def __init__(self, model: PreTrainedModel, stop_token_id: int) -> None:
        self.model, self.stop_id = model, stop_token_id

    def generate_ours(self, prompts: Ids, max_new_tokens: int, batch_size: int, stops: bool = True) -> Ids:
        params = SamplingParams(max_new_tokens=max_new_tokens)
        answers = generate(self.model, prompts, [self.stop_id] if stops else [], params, batch_size=batch_size)
        return [answer.ids for answer in answers]

    def generate_theirs(self, prompts: Ids, max_new_tokens: int, batch_size: int, stops: bool = True) -> Ids:
        batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
        return [answer for batch in batches for answer in self._generate_batch(batch, max_new_tokens, stops)]

    def _generate_batch(self, prompts: Ids, max_new_tokens: int, stops: bool) -> Ids:
        width = max(map(len, prompts))
        device = self.model.device
        ids = torch.tensor([[self.stop_id] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        output = self.model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_id if stops else None,
            pad_token_id=self.stop_id,
        )
        answers = output[:, width:].tolist()
        return [
            answer[: answer.index(self.stop_id)] if stops and self.stop_id in answer else answer for answer in answers
        ]

    def compute_margin(self, prompt: list[int], ours: list[int], theirs: list[int]) -> float | None:
        """Return the difference in logits of the first tokens at which two answers differ; None if they are equal."""
        if ours == theirs:
            return None
        differing = (index for index, (our_id, their_id) in enumerate(zip(ours, theirs)) if our_id != their_id)
        index = next(differing, min(len(ours), len(theirs)))
        with torch.no_grad():
            ids = torch.tensor([prompt + ours[:index]], device=self.model.device)
            logits = self.model(ids).logits[0, -1].float()
        chosen = [logits[answer[index] if index < len(answer) else self.stop_id] for answer in (ours, theirs)]
        return float((chosen[0] - chosen[1]).abs())


def time_rounds(repeat: int, prompts: Ids, methods: Mapping[str, Callable[[Ids], Ids]]) -> dict:
    """Return seconds and tokens of each method, run in turn, and the ratio of their median tokens/s."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    tokens: dict[str, int] = {}
    for _ in range(repeat):
        for name, method in methods.items():
            start_time = time.perf_counter()
            answers = method(prompts)
            seconds[name].append(round(time.perf_counter() - start_time, 3))
            tokens[name] = sum(map(len, answers))
    speed = {name: tokens[name] / statistics.median(seconds[name]) for name in methods}
    return {"prompts": len(prompts), "tokens": tokens, "seconds": seconds, "tokens_per_second": speed,
            "ratio": speed["ours"] / speed["theirs"]}  # fmt: skip


def compare_answers(comparison: Comparison, prompts: Ids, max_new_tokens: int) -> dict[str, int]:
    """Compare our answers in refilled batches with theirs one prompt at a time, and count equal and differing ones."""
    ours = comparison.generate_ours(prompts, max_new_tokens, BATCH_SIZES[0])
    theirs = comparison.generate_theirs(prompts, max_new_tokens, 1)
    margins = [comparison.compute_margin(*answers) for answers in zip(prompts, ours, theirs)]
    return {
        "prompts": len(prompts),
        "same": margins.count(None),
        "parted_at_a_tie": sum(margin is not None and margin < TIE for margin in margins),
        "parted_elsewhere": sum(margin is not None and margin >= TIE for margin in margins),
    }


def measure_speeds(comparison: Comparison, prompts: Ids, max_new_tokens: int, repeat: int) -> dict[str, dict]:
    """Return the timings one prompt at a time and per batch size, by their titles."""
    methods = {"ours": comparison.generate_ours, "theirs": comparison.generate_theirs}
    single = {name: partial(method, max_new_tokens=64, batch_size=1, stops=False) for name, method in methods.items()}
    results = {"one prompt at a time, 64 tokens each": time_rounds(repeat, prompts[:3], single)}
    for batch_size in BATCH_SIZES:
        batched = {
            name: partial(method, max_new_tokens=max_new_tokens, batch_size=batch_size)
            for name, method in methods.items()
        }
        title = f"{PROMPTS} prompts, {batch_size} side by side, natural stops"
        results[title] = time_rounds(repeat, prompts[:PROMPTS], batched)
    return results


def format_markdown(results: dict) -> str:
    lines = ["| | ours, tokens/s | transformers, tokens/s | ratio |", "| --- | --- | --- | --- |"]
    for name, result in results.items():
        if "ratio" in result:
            speed = result["tokens_per_second"]
            lines.append(f"| {name} | {speed['ours']:.1f} | {speed['theirs']:.1f} | {result['ratio']:.2f}x |")
    if "check" in results:
        counts = results["check"]
        lines.append(
            f"\n{counts['same']} of {counts['prompts']} answers are the same token for token; "
            f"{counts['parted_at_a_tie']} differ at a tie within {TIE}, {counts['parted_elsewhere']} elsewhere."
        )
    return "\n".join([*lines, f"\nKey-value cache per row: {results['memory']['bytes_per_token']:,} bytes/token."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the output folder of a finished run")
    parser.add_argument("data", help="a file of prompts or instruction rows, such as alpaca_en_demo.json")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="maximum tokens of an answer (128)")
    parser.add_argument("--repeat", type=int, default=2, help="rounds (2)")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="compare the tokens of N answers instead")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    model, template, system_prompt = load_trained(args.model)
    comparison = Comparison(model.cpu().eval(), template.stop_token_id)
    conversations = [prompt.conversation for prompt in load_prompts(args.data) if not prompt.problem]
    conversations = conversations[: max(PROMPTS, args.check)]
    prompts = [template.encode_prompt(add_system_prompt(row, system_prompt)) for row in conversations]
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    results: dict = {"memory": {"bytes_per_token": compute_bytes_per_token(config.num_hidden_layers, heads, size)}}
    if args.check:
        results["check"] = compare_answers(comparison, prompts[: args.check], args.max_new_tokens)
    else:
        results |= measure_speeds(comparison, prompts, args.max_new_tokens, args.repeat)
    print(format_markdown(results))
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        args.output.with_suffix(".md").write_text(format_markdown(results) + "\n")


if __name__ == "__main__":
    main()
