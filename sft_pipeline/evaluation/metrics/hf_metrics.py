"""The metrics as `evaluate.Metric` objects, which need no hub: make one and use it, alone or in `evaluate.combine`.

    both = evaluate.combine([Repetition(), Overlap(), PromptEcho()])
    both.compute(predictions=answers, references=references, prompts=prompts)

Each takes the columns of its `features`, in `compute` or in batches by `add_batch`, and gives the metrics of the
function it wraps, under their names. `combine` hands each metric the others' columns as well; it leaves them alone.
"""

from collections.abc import Sequence

import evaluate
from datasets import Features, Value

from sft_pipeline.evaluation.metrics import degeneration, instruction_following, registry

_TEXT, _NUMBER = Value("string"), Value("float64")
_DESCRIPTION = "One value a row for each of: {columns}. Returns a dictionary of floats, named with their units."


class HeldOutLoss(evaluate.Metric):
    """`metrics.loss_figures` from one row an answer: summed nll in nats, supervised tokens, correct ones, bytes."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, nll_nats=_NUMBER, tokens=_NUMBER, correct=_NUMBER, utf8_bytes=_NUMBER)

    def _compute(
        self,
        *,
        nll_nats: Sequence[float],
        tokens: Sequence[float],
        correct: Sequence[float],
        utf8_bytes: Sequence[float],
        **_: object,
    ) -> dict[str, float]:
        return registry.loss_figures(nll_nats, tokens, correct, utf8_bytes)


class Stopping(evaluate.Metric):
    """`metrics.stopping_figures` from the answers' finish reasons ("stop", "length")."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, finish_reasons=_TEXT)

    def _compute(self, *, finish_reasons: Sequence[str], **_: object) -> dict[str, float]:
        return registry.stopping_figures(finish_reasons)


class Repetition(evaluate.Metric):
    """`metrics.repetition_figures`: rep-n, distinct-n and the share of answers caught in a loop."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, predictions=_TEXT)

    def _compute(self, *, predictions: Sequence[str], **_: object) -> dict[str, float]:
        return registry.repetition_figures(predictions)


class PromptEcho(evaluate.Metric):
    """`behaviour.prompt_echo_share`: how much of the prompt is copied into the answer."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, predictions=_TEXT, prompts=_TEXT)

    def _compute(self, *, predictions: Sequence[str], prompts: Sequence[str], **_: object) -> dict[str, float]:
        return {"prompt_echo_share": degeneration.prompt_echo_share(prompts, predictions)}


class AnswerLength(evaluate.Metric):
    """`behaviour.answer_length_ratio`: words of the answers over words of the references."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, predictions=_TEXT, references=_TEXT)

    def _compute(self, *, predictions: Sequence[str], references: Sequence[str], **_: object) -> dict[str, float]:
        return {"answer_length_ratio": degeneration.answer_length_ratio(predictions, references)}


class Overlap(evaluate.Metric):
    """`metrics.overlap_figures`: BLEU, chrF, ROUGE-L, exact match and F1 against one reference an answer."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, predictions=_TEXT, references=_TEXT)

    def _compute(self, *, predictions: Sequence[str], references: Sequence[str], **_: object) -> dict[str, float]:
        return registry.overlap_figures(predictions, references)


class InstructionsFollowed(evaluate.Metric):
    """`instructions.instruction_figures`: share of checkable instructions followed; ids as in `load_instructions`."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, predictions=_TEXT, instruction_ids=_TEXT)

    def _compute(self, *, predictions: Sequence[str], instruction_ids: Sequence[str], **_: object) -> dict[str, float]:
        return instruction_following.instruction_figures(predictions, instruction_ids)


def _info(metric: evaluate.Metric, **columns: Value) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=type(metric).__doc__ or "",
        citation="",
        inputs_description=_DESCRIPTION.format(columns=", ".join(columns)),
        features=Features(columns),
    )
