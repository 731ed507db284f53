"""Results of an evaluation and rows of its table."""

from sft_pipeline.evaluation.step_results import StepResults


def make_results(step: int, table: list, complete: bool = True, nll=(4.0, 6.0), tokens=(2.0, 3.0)) -> StepResults:
    return StepResults(step, complete, 3.0, {}, {"nll_nats": list(nll), "tokens": list(tokens)}, 9, table)


def make_row(answer: str, stopped: bool = True, **fields) -> dict:
    return {
        "instruction": None,
        "prompt": "p",
        "reference": "r",
        "answer": answer,
        "stopped": stopped,
        "calls_match": None,
        "error": None,
    } | fields
