"""Training some of the parameters: the rest is frozen, needs no gradient and no optimizer state."""

from __future__ import annotations

import re

from torch import nn

from sft_pipeline.utils.errors import SFTError


def freeze_except(model: nn.Module, patterns: list[str]) -> None:
    """Freeze what none of the regular expressions is found in the name of: "self_attn", or r"layers\\.(28|29)\\.".

    Raises SFTError for an expression that does not parse or that no parameter has. A tied head has the name of the
    embedding.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise SFTError(f"trainable_modules {pattern}: not a regular expression ({error})") from error
        if not found:
            raise SFTError(
                f"trainable_modules {pattern}: no parameter has such a name; there are {names[0]}, {names[-1]} …"
            )
    for name, weight in model.named_parameters():
        weight.requires_grad = any(re.search(pattern, name) for pattern in patterns)
