"""Partial fine-tuning: frozen parameters have no gradient and no optimizer state."""

from __future__ import annotations

import re

from torch import nn

from sft_pipeline.utils.errors import SFTError


def freeze_except(model: nn.Module, patterns: list[str]) -> None:
    """Freeze all parameters but those whose name a regular expression in `patterns` is found in.

    Examples: "self_attn", or r"layers\\.(28|29)\\.". The head of a model with tied embeddings has the name of the
    embedding. Raises SFTError for a pattern that is not a regular expression or that matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            has_match = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise SFTError(f"trainable_modules {pattern}: not a regular expression ({error})") from error
        if not has_match:
            raise SFTError(
                f"trainable_modules {pattern}: matches no parameter name; names are {names[0]}, …, {names[-1]}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(re.search(pattern, name) for pattern in patterns)
