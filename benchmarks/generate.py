"""Generation side by side with `transformers.generate`, in one sitting: ours, theirs, ours, theirs, ...

    python benchmarks/generate.py outputs/quickstart alpaca_en_demo.json --output docs/generation
    python benchmarks/generate.py outputs/quickstart alpaca_en_demo.json --check 200

The model is a run's output folder, so that answers stop by themselves; the data has the prompts. One prompt at a time,
a fixed number of tokens; and 64 prompts of mixed lengths, 16 and 64 of them side by side, which theirs pads on the left
and holds until the longest answer ends. --check compares the tokens of as many answers, theirs one prompt at a
time, and counts where they part: at a tie (two logits within 1e-5, so that rounding chooses) or not. --output writes
OUTPUT.json and OUTPUT.md.
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

from sft_pipeline.data.chat_templates import Template
from sft_pipeline.data.messages import add_system_prompt
from sft_pipeline.data.prompts import load_prompts
from sft_pipeline.inference.engine import generate
from sft_pipeline.inference.kv_cache import compute_bytes_per_token
from sft_pipeline.inference.sampling import SamplingParams
from sft_pipeline.runs.trained_model import load_trained

Ids = list[list[int]]
WIDTHS, PROMPTS, TIE = (16, 64), 64, 1e-5


class Contest:
    """Both ways to answer prompts' ids greedily with one model; answers come without the stop token."""

    model: Any  # with the methods of transformers' GenerationMixin

    def __init__(self, model: PreTrainedModel, template: Template) -> None:
        self.model, self.stop = model, template.stop_token_id

    def ours(self, prompts: Ids, new: int, batch_size: int, stops: bool = True) -> Ids:
        settings = SamplingParams(max_new_tokens=new)
        done = generate(self.model, prompts, [self.stop] if stops else [], settings, batch_size=batch_size)
        return [one.ids for one in done]

    def theirs(self, prompts: Ids, new: int, batch_size: int, stops: bool = True) -> Ids:
        batches = [prompts[at : at + batch_size] for at in range(0, len(prompts), batch_size)]
        return [answer for batch in batches for answer in self._batch(batch, new, stops)]

    def _batch(self, prompts: Ids, new: int, stops: bool) -> Ids:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.stop] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self.model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=self.stop if stops else None,
            pad_token_id=self.stop,
        )
        answers = output[:, width:].tolist()
        return [answer[: answer.index(self.stop)] if stops and self.stop in answer else answer for answer in answers]

    def margin(self, prompt: list[int], ours: list[int], theirs: list[int]) -> float | None:
        """How far apart in logits the tokens are at which two answers part; None if they are the same."""
        if ours == theirs:
            return None
        at = next((at for at, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + ours[:at]])).logits[0, -1]
        chosen = [logits[answer[at] if at < len(answer) else self.stop] for answer in (ours, theirs)]
        return float((chosen[0] - chosen[1]).abs())


def rounds(repeat: int, prompts: Ids, ways: Mapping[str, Callable[[Ids], Ids]]) -> dict:
    """Seconds and tokens of each way, taken in turn, and the ratio of their median tokens a second."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, int] = {}
    for _ in range(repeat):
        for name, way in ways.items():
            started = time.perf_counter()
            answers = way(prompts)
            seconds[name].append(round(time.perf_counter() - started, 3))
            tokens[name] = sum(map(len, answers))
    speed = {name: tokens[name] / statistics.median(seconds[name]) for name in ways}
    return {"prompts": len(prompts), "tokens": tokens, "seconds": seconds, "tokens_per_second": speed,
            "ratio": speed["ours"] / speed["theirs"]}  # fmt: skip


def check(contest: Contest, prompts: Ids, new: int) -> dict[str, int]:
    """Our answers in refilled batches against theirs one prompt at a time."""
    pairs = zip(prompts, contest.ours(prompts, new, WIDTHS[0]), contest.theirs(prompts, new, 1))
    margins = [contest.margin(*pair) for pair in pairs]
    return {
        "prompts": len(prompts),
        "same": margins.count(None),
        "parted_at_a_tie": sum(m is not None and m < TIE for m in margins),
        "parted_elsewhere": sum(m is not None and m >= TIE for m in margins),
    }


def markdown(results: dict) -> str:
    lines = ["| | ours, tokens/s | transformers, tokens/s | ratio |", "| --- | --- | --- | --- |"]
    for name, found in results.items():
        if "ratio" in found:
            speed = found["tokens_per_second"]
            lines.append(f"| {name} | {speed['ours']:.1f} | {speed['theirs']:.1f} | {found['ratio']:.2f}x |")
    if "check" in results:
        found = results["check"]
        lines.append(
            f"\n{found['same']} of {found['prompts']} answers are the same token for token; {found['parted_at_a_tie']} "
            f"part at a tie within {TIE}, {found['parted_elsewhere']} elsewhere."
        )
    return "\n".join([*lines, f"\nMemory a row: {results['memory']['bytes_per_token']:,} bytes a token."])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="compare the tokens of N answers instead")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model, template, system_prompt = load_trained(args.model)
    contest, new = Contest(model.cpu().eval(), template), args.max_new_tokens
    asked = [one.messages for one in load_prompts(args.data) if not one.problem][: max(PROMPTS, args.check)]
    prompts = [template.encode_prompt(add_system_prompt(messages, system_prompt)) for messages in asked]
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    results: dict = {"memory": {"bytes_per_token": compute_bytes_per_token(config.num_hidden_layers, heads, size)}}
    if args.check:
        results["check"] = check(contest, prompts[: args.check], new)
    else:
        ways = {"ours": contest.ours, "theirs": contest.theirs}
        alone = {name: partial(way, new=64, batch_size=1, stops=False) for name, way in ways.items()}
        results["one prompt at a time, 64 tokens each"] = rounds(args.repeat, prompts[:3], alone)
        for width in WIDTHS:
            many = {name: partial(way, new=new, batch_size=width) for name, way in ways.items()}
            title = f"{PROMPTS} prompts, {width} side by side, natural stops"
            results[title] = rounds(args.repeat, prompts[:PROMPTS], many)
    print(markdown(results))
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        args.output.with_suffix(".md").write_text(markdown(results) + "\n")


if __name__ == "__main__":
    main()
