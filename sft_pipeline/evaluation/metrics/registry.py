"""The table of metrics: what one answer scores, what a set of answers scores, what held-out loss says.

The metrics themselves live in the other files of this folder; this one names them. `row_figures` keeps one dictionary
an answer, which paired comparison needs (`bootstrap.py`); `answer_figures` is one dictionary for them all. A figure
under the same name is the mean of the rows'. `_rate` and `_share` and `_f1` run from 0 to 1, `_percent` from 0 to 100.
"""

from collections.abc import Sequence

from sft_pipeline.evaluation.metrics import degeneration, likelihood, reference_overlap
from sft_pipeline.evaluation.metrics.words import units, words

REP_N = (2, 3, 4)
DISTINCT_N = (1, 2)


def loss_figures(
    nll_nats: likelihood.Amounts,
    tokens: likelihood.Amounts,
    correct: likelihood.Amounts,
    utf8_bytes: likelihood.Amounts,
) -> dict[str, float]:
    """Held-out metrics from amounts a row or summed: nll in nats, supervised tokens, correct ones, bytes of text."""
    return {
        "nll_nats_per_token": likelihood.nll_nats_per_token(nll_nats, tokens),
        "perplexity": likelihood.perplexity(nll_nats, tokens),
        "bits_per_byte": likelihood.bits_per_byte(nll_nats, utf8_bytes),
        "token_accuracy": likelihood.token_accuracy(correct, tokens),
    }


def row_figures(
    answer: str, *, prompt: str | None = None, reference: str | None = None, finish_reason: str | None = None
) -> dict[str, float]:
    """The metrics one answer has by itself; what needs a prompt, reference or finish reason is left out without it.

    `answer_words` and `reference_words` are the two sides of `answer_length_ratio`, for `compare.paired_difference`.
    """
    sequence = units(answer)
    metrics = {f"rep_{n}_share": degeneration.repeated_ngram_share(sequence, n) for n in REP_N}
    metrics |= {"loop_rate": float(degeneration.is_loop(answer)), "answer_words": float(len(words(answer)))}
    if finish_reason is not None:
        metrics |= {"stop_rate": float(finish_reason == "stop"), "cap_rate": float(finish_reason == "length")}
    if prompt is not None:
        metrics["prompt_echo_share"] = degeneration.prompt_echo(prompt, answer)
    if reference is not None:
        metrics["reference_words"] = float(len(words(reference)))
        metrics["rouge_l_f1"] = reference_overlap.rouge_l(answer, reference)
        metrics["exact_match_rate"] = reference_overlap.exact_match(answer, reference)
        metrics["word_f1"] = reference_overlap.word_f1(answer, reference)
    return metrics


def answer_figures(
    answers: Sequence[str],
    *,
    prompts: Sequence[str] | None = None,
    references: Sequence[str] | None = None,
    finish_reasons: Sequence[str] | None = None,
) -> dict[str, float]:
    """All metrics over a set of answers; what needs a column that is not given is left out.

    Raises SFTError without answers, for columns of different lengths and for references that are all empty.
    """
    metrics = repetition_figures(answers)
    if finish_reasons is not None:
        degeneration.require_same_length(answers=answers, finish_reasons=finish_reasons)
        metrics |= stopping_figures(finish_reasons)
    if prompts is not None:
        metrics["prompt_echo_share"] = degeneration.prompt_echo_share(prompts, answers)
    if references is not None:
        metrics["answer_length_ratio"] = degeneration.answer_length_ratio(answers, references)
        metrics |= overlap_figures(answers, references)
    return metrics


def repetition_figures(answers: Sequence[str]) -> dict[str, float]:
    """Repetition in answers (rep-n, loops) and variety across them (distinct-n). Raises SFTError without answers."""
    metrics = {f"rep_{n}_share": degeneration.rep_n_share(answers, n) for n in REP_N}
    metrics |= {f"distinct_{n}_share": degeneration.distinct_n_share(answers, n) for n in DISTINCT_N}
    return metrics | {"loop_rate": degeneration.loop_rate(answers)}


def stopping_figures(finish_reasons: Sequence[str]) -> dict[str, float]:
    """Shares of answers that ended by themselves and that hit the token limit. Raises SFTError without answers."""
    return {"stop_rate": degeneration.stop_rate(finish_reasons), "cap_rate": degeneration.cap_rate(finish_reasons)}


def overlap_figures(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Closeness to the references. Raises SFTError for empty lists or lists of different lengths."""
    return {
        "bleu_percent": reference_overlap.bleu_percent(answers, references),
        "chrf_percent": reference_overlap.chrf_percent(answers, references),
        "rouge_l_f1": reference_overlap.rouge_l_f1(answers, references),
        "exact_match_rate": reference_overlap.exact_match_rate(answers, references),
        "word_f1": reference_overlap.mean_word_f1(answers, references),
    }
