"""Constants shared by data and model."""

IGNORED = -100  # label of a position without a target; the default ignore_index of torch and transformers
