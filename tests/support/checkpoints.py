"""Small checkpoint folders, saved as the trainer saves them."""

from pathlib import Path

from sft_pipeline.runs.checkpoints import (
    clear_leftovers,
    publish_checkpoint,
    rotate_checkpoints,
)


def write_checkpoint(folder: Path, step: int, text: str = "weights") -> Path:
    """A folder as `publish_checkpoint` takes it: two files, and a folder with another."""
    staging = folder / ".saving" / f"checkpoint-{step}"
    (staging / "shards").mkdir(parents=True)
    (staging / "model.safetensors").write_text(text)
    (staging / "trainer_state.json").write_text("{}")
    (staging / "shards" / "optimizer.pt").write_text(text)
    return staging


def save_checkpoint(folder: Path, step: int, limit: int | None = None, text: str = "weights") -> Path:
    """As the trainer does it."""
    checkpoint = folder / f"checkpoint-{step}"
    publish_checkpoint(write_checkpoint(folder, step, text), checkpoint)
    rotate_checkpoints(checkpoint, limit, None)
    clear_leftovers(folder)
    return checkpoint
