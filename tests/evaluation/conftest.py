"""Two tiny models, their answers to a prompt set, and their comparison."""

import pytest
from support.model_comparison import data, other_folder

from sft_pipeline.commands.evaluate import (
    EvaluateOptions,
    load_prompt_set,
    run_model,
)
from sft_pipeline.evaluation.comparison import Comparison, compare_models
from sft_pipeline.evaluation.model_results import ModelResults
from sft_pipeline.evaluation.prompt_set import PromptSet

__all__ = ["data", "other_folder"]


@pytest.fixture(scope="module")
def evaluated(data, model_folder, other_folder, few_instructions) -> tuple[PromptSet, list[ModelResults]]:
    """Both models, without and with two examples."""
    request = EvaluateOptions(data, num_prompts=5, max_new_tokens=8, few_shot=2)
    questions = load_prompt_set(request)
    models = (model_folder, "first"), (other_folder, "second")
    return questions, [results for path, name in models for results in run_model(str(path), name, questions, request)]


@pytest.fixture(scope="module")
def comparison(evaluated) -> Comparison:
    questions, records = evaluated
    return compare_models(records, questions)
