"""All metrics, each defined once: what it is computed from, how, and its title, unit and format.

    METRICS["rouge_l_f1"].compute({"predictions": answers, "references": references})
    METRICS["rouge_l_f1"].format(0.256)  # "25.6%"

`compute_metrics` (hf_metrics.py) computes them through `evaluate`; tables, charts and reports take titles and formats
from here. Names carry the unit: `_rate`, `_share` and `_f1` run from 0 to 1, `_percent` from 0 to 100.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from sft_pipeline.evaluation.metrics import degeneration, reference_overlap
from sft_pipeline.evaluation.metrics.instruction_following import get_instruction, is_followed
from sft_pipeline.evaluation.metrics.words import split_units, split_words
from sft_pipeline.utils.errors import SFTError

# Column name -> one value per row, or None for a row that does not count in the metrics of that column. The loss
# columns are sums over the supervised tokens of a row: negative log-likelihood in nats, tokens, tokens that are the
# model's most likely one, and bytes of the text.
Columns = Mapping[str, Sequence[Any]]
TEXT_COLUMNS = ("predictions", "references", "prompts", "finish_reasons", "instruction_ids")
NUMBER_COLUMNS = ("nll_nats", "tokens", "correct", "utf8_bytes")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric is a ratio of sums over rows (`compute_row`) or a function of all rows (`compute_all`).

    columns: the names of the arguments of `compute_row` and `compute_all`, in their order.
    compute_row: (numerator, denominator) of one row. A mean over rows has denominator 1.
    divisor: divides the sum of the numerators, to convert their unit.
    get_groups: the groups that a row belongs to; each group has a value of its own, under the name and the group.
    short_title: for a column of a table, if it differs from the title.
    unit: "%" for a share of 1, which is shown times 100.
    decimals: None for up to 6 significant digits.
    hub_type: the metric's type in a model card on the Hub, if it differs from the name.
    """

    name: str
    title: str
    description: str = ""
    columns: tuple[str, ...] = ()
    compute_row: Callable[..., tuple[float, float]] | None = None
    compute_all: Callable[..., float] | None = None
    divisor: float = 1.0
    get_groups: Callable[..., tuple[str, ...]] | None = None
    short_title: str = ""
    unit: str = ""
    decimals: int | None = 1
    hub_type: str = ""

    def compute(self, columns: Columns) -> float:
        """Return the value over all rows. Raises SFTError where the denominators sum to 0."""
        if self.compute_all:
            return float(self.compute_all(*(columns[name] for name in self.columns)))
        numerators, denominators = self._compute_pairs(columns)
        if not denominators.sum() > 0:
            raise SFTError(f"{self.name}: all rows of {self.columns[-1]} are empty or 0; add rows that are not")
        return float(numerators.sum() / self.divisor / denominators.sum())

    def compute_with_groups(self, columns: Columns) -> dict[str, float]:
        """Return {name: value} over all rows and over the rows of each group."""
        values = {self.name: self.compute(columns)}
        if self.get_groups:
            groups = [self.get_groups(*row) for row in self._iterate_rows(columns)]
            for group in sorted(set().union(*groups)):
                rows = [i for i, row_groups in enumerate(groups) if group in row_groups]
                selected = {name: [columns[name][i] for i in rows] for name in self.columns}
                values[f"{self.name}_{group}"] = self.compute(selected)
        return values

    def compute_rows(self, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """Return the numerators and denominators, each of shape (rows,); both are 0 for a row with None in a column."""
        numerators, denominators = self._compute_pairs(columns)
        return numerators / self.divisor, denominators

    def _compute_pairs(self, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        assert self.compute_row is not None, f"{self.name} has no value per row"
        pairs = [(0, 0) if None in row else self.compute_row(*row) for row in self._iterate_rows(columns)]
        numerators, denominators = np.array(pairs, dtype=np.float64).reshape(-1, 2).T.copy()
        return numerators, denominators

    def _iterate_rows(self, columns: Columns) -> Iterator[tuple[Any, ...]]:
        return zip(*(columns[name] for name in self.columns), strict=True)

    @property
    def label(self) -> str:
        """The title, with the unit unless it is "%", which `format` appends to the number."""
        return f"{self.title}, {self.unit}" if self.unit not in ("", "%") else self.title

    @property
    def heading(self) -> str:
        """The short title with the unit, for numbers by `format_number`."""
        title = self.short_title or self.title
        return f"{title}, {self.unit}" if self.unit else title

    @property
    def scale(self) -> int:
        """The factor from a value to the number that is shown."""
        return 100 if self.unit == "%" else 1

    @property
    def rounded(self) -> "Metric":
        """The metric with percentages shown without decimals, for summaries."""
        return replace(self, decimals=0) if self.unit == "%" else self

    def format_number(self, value: float, sign: str = "") -> str:
        """Return the number without its unit; `sign` is "+" for a difference."""
        precision = "6g" if self.decimals is None else f"{self.decimals}f"
        return f"{self.scale * value:{sign}.{precision}}"

    def format(self, value: float) -> str:
        """Return the value, with "%" if that is the unit."""
        return self.format_number(value) + ("%" if self.unit == "%" else "")

    def format_change(self, value: float) -> str:
        """Return the difference of two values, with its sign."""
        return self.format_number(value, "+") + ("%" if self.unit == "%" else "")


def _compute_perplexity(nll_nats: Sequence[float], tokens: Sequence[float]) -> float:
    try:
        return math.exp(METRICS["nll_nats_per_token"].compute({"nll_nats": nll_nats, "tokens": tokens}))
    except OverflowError:
        return math.inf


def _get_instruction_groups(answer: str, instruction_id: str) -> tuple[str, str]:
    instruction = get_instruction(instruction_id)
    return f"category_{instruction.category}", f"language_{instruction.language}"


def _define_repetition(n: int) -> Metric:
    return Metric(
        name=f"rep_{n}_share",
        title=f"repeated {n}-grams",
        short_title=f"rep-{n}",
        unit="%",
        description=f"Mean over answers of the share of {n}-grams that occur earlier in the answer, of words, CJK "
        "characters and punctuation. Compare within one language: Chinese repeats characters more than English words.",
        columns=("predictions",),
        compute_row=lambda answer: (degeneration.compute_repeated_ngram_share(split_units(answer), n), 1),
    )


def _define_distinct(n: int) -> Metric:
    return Metric(
        name=f"distinct_{n}_share",
        title=f"distinct {n}-grams",
        short_title=f"distinct-{n}",
        unit="%",
        description=f"Distinct {n}-grams / {n}-grams of all answers. Falls as the number of answers grows: compare "
        "models on the same prompts.",
        columns=("predictions",),
        compute_all=partial(degeneration.compute_distinct_n_share, n=n),
    )


INSTRUCTIONS_FOLLOWED = "instructions_followed_rate"
TOOL_CALLS_MATCHED = "tool_call_match_rate"
# In the order of tables.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="nll_nats_per_token",
            title="held-out loss",
            unit="nats/token",
            decimals=3,
            hub_type="loss",
            description="Mean negative log-likelihood of a supervised token. All tokens weigh the same, whatever their "
            "row. NaN for a model that diverged.",
            columns=("nll_nats", "tokens"),
            compute_row=lambda nll_nats, tokens: (nll_nats, tokens),
        ),
        Metric(
            name="perplexity",
            title="held-out perplexity",
            short_title="perplexity",
            decimals=2,
            description="exp of the loss in nats/token; inf on overflow.",
            columns=("nll_nats", "tokens"),
            compute_all=_compute_perplexity,
        ),
        Metric(
            name="bits_per_byte",
            title="held-out loss",
            unit="bits/byte",
            decimals=3,
            description="Negative log-likelihood in bits / UTF-8 bytes of the supervised text; compares models with "
            "different tokenizers. The stop token costs bits but has no bytes.",
            columns=("nll_nats", "utf8_bytes"),
            compute_row=lambda nll_nats, utf8_bytes: (nll_nats, utf8_bytes),
            divisor=math.log(2),
        ),
        Metric(
            name="token_accuracy",
            title="held-out token accuracy",
            short_title="token accuracy",
            unit="%",
            hub_type="accuracy",
            description="Share of supervised tokens that are the model's most likely token.",
            columns=("correct", "tokens"),
            compute_row=lambda correct, tokens: (correct, tokens),
        ),
        Metric(
            name="stop_rate",
            title="answers that end on their own",
            short_title="stop rate",
            unit="%",
            description='Share of answers that the model ended: finish reason "stop".',
            columns=("finish_reasons",),
            compute_row=lambda finish_reason: (finish_reason == "stop", 1),
        ),
        Metric(
            name="cap_rate",
            title="answers cut by the token limit",
            short_title="cap rate",
            unit="%",
            description='Share of answers with finish reason "length". "error" counts as neither "length" nor "stop".',
            columns=("finish_reasons",),
            compute_row=lambda finish_reason: (finish_reason == "length", 1),
        ),
        Metric(
            name="loop_rate",
            title="answers in a loop",
            short_title="loop (复读机) rate",
            unit="%",
            description="Share of answers that end in a loop: one period, 3 times or more, over 30 characters or more.",
            columns=("predictions",),
            compute_row=lambda answer: (degeneration.is_loop(answer), 1),
        ),
        *(_define_repetition(n) for n in (2, 3, 4)),
        *(_define_distinct(n) for n in (1, 2)),
        Metric(
            name="prompt_echo_share",
            title="prompt copied into the answer",
            short_title="prompt echo",
            unit="%",
            description="Mean over answers of the longest run of prompt words in the answer / words of the prompt.",
            columns=("prompts", "predictions"),
            compute_row=lambda prompt, answer: (degeneration.compute_prompt_echo(prompt, answer), 1),
        ),
        Metric(
            name="answer_length_ratio",
            title="answer length / reference length",
            short_title="length / reference",
            decimals=2,
            description="Words of all answers / words of all references. A mean of ratios would be dominated by the "
            "shortest references.",
            columns=("predictions", "references"),
            compute_row=lambda answer, reference: (len(split_words(answer)), len(split_words(reference))),
        ),
        Metric(
            name="bleu_percent",
            title="BLEU",
            description="Corpus BLEU by sacrebleu, from 0 to 100; its Chinese tokenizer if a reference is Chinese.",
            columns=("predictions", "references"),
            compute_all=reference_overlap.compute_bleu_percent,
        ),
        Metric(
            name="chrf_percent",
            title="chrF",
            description="Corpus chrF2 by sacrebleu, from 0 to 100.",
            columns=("predictions", "references"),
            compute_all=reference_overlap.compute_chrf_percent,
        ),
        Metric(
            name="rouge_l_f1",
            title="ROUGE-L",
            unit="%",
            description="Mean over answers of the F1 of the longest common subsequence of words.",
            columns=("predictions", "references"),
            compute_row=lambda answer, reference: (reference_overlap.compute_rouge_l(answer, reference), 1),
        ),
        Metric(
            name="exact_match_rate",
            title="exact match",
            unit="%",
            description="Share of answers with the words of the reference, after SQuAD's normalization.",
            columns=("predictions", "references"),
            compute_row=lambda answer, reference: (reference_overlap.compute_exact_match(answer, reference), 1),
        ),
        Metric(
            name="word_f1",
            title="word F1",
            unit="%",
            description="Mean over answers of the F1 of the bags of words, after SQuAD's normalization.",
            columns=("predictions", "references"),
            compute_row=lambda answer, reference: (reference_overlap.compute_word_f1(answer, reference), 1),
        ),
        Metric(
            name=TOOL_CALLS_MATCHED,
            title="tool calls matched",
            short_title="tool calls",
            unit="%",
            description="Share of answers with the calls of the reference, the same names and arguments in the same "
            "order; of the answers whose reference calls tools.",
            columns=("calls_match",),
            compute_row=lambda calls_match: (calls_match, 1),
        ),
        Metric(
            name=INSTRUCTIONS_FOLLOWED,
            title="instructions followed",
            unit="%",
            description="Share of checkable instructions (`load_instructions`) that the answers follow.",
            columns=("predictions", "instruction_ids"),
            compute_row=lambda answer, instruction_id: (is_followed(get_instruction(instruction_id), answer), 1),
            get_groups=_get_instruction_groups,
        ),
    )
}


def get_metric(name: str) -> Metric:
    """Return the metric whose values are stored under this name; a name that is no metric's, as that of a count, is its
    own title."""
    if name in METRICS:
        return METRICS[name]
    for metric in METRICS.values():
        if metric.get_groups and name.startswith(f"{metric.name}_"):
            group = name.removeprefix(f"{metric.name}_").replace("_", " ")
            return replace(metric, name=name, title=f"{metric.title}, {group}")
    return Metric(name=name, title=name.replace("_", " "), decimals=None)


def select_metrics(columns: Collection[str]) -> list[Metric]:
    """Return the metrics that these columns suffice for.

    With instruction ids, that is the share of instructions followed alone: the answers to instructions are no sample
    of answers to held-out prompts.
    """
    is_instructions = "instruction_ids" in columns
    return [
        metric
        for metric in METRICS.values()
        if set(metric.columns) <= set(columns) and ("instruction_ids" in metric.columns) == is_instructions
    ]


def build_answer_columns(
    answers: Sequence[str],
    prompts: Sequence[str],
    references: Sequence[str],
    finish_reasons: Sequence[str],
    calls_match: Sequence[bool | None],
) -> dict[str, Sequence[Any]]:
    """Return the columns of answers to held-out prompts.

    calls_match: None where the reference calls no tool. Where it does, the calls are compared and not their text, so
    `references` has None. It is left out if none of the others has a word, as no metric is defined then.
    """
    columns: dict[str, Sequence[Any]] = {"predictions": answers, "prompts": prompts, "finish_reasons": finish_reasons}
    texts = [text if match is None else None for text, match in zip(references, calls_match, strict=True)]
    if any(text and split_words(text) for text in texts):
        columns["references"] = texts
    if any(match is not None for match in calls_match):
        columns["calls_match"] = [None if match is None else float(match) for match in calls_match]
    return columns
