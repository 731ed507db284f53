"""The one number that data and model agree on."""

IGNORED = -100  # the label of a position without a target; torch's cross-entropy and transformers have the same
