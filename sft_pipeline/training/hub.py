"""Push a trained model to the hub, by a list of files: model, tokenizer and card.

What holds text of rows, prompts or answers (evaluations, previews, logs) is pushed with `push_evaluation: true` alone.
Checkpoints, and what belongs to a tracker, never are.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from transformers.trainer import TRAINER_STATE_NAME

from sft_pipeline.config import get_output_dir
from sft_pipeline.model.module_utils import unwrap_peft
from sft_pipeline.model.quantization import QUANTIZATION_FILE
from sft_pipeline.reports.model_card import build_model_card
from sft_pipeline.runs.output_dir import (
    EVALUATION_DIR,
    PREVIEW_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RUN_FILE,
    TEMPLATE_FILE,
)
from sft_pipeline.training.final_results import build_results
from sft_pipeline.utils.errors import SFTError, format_error

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from sft_pipeline.training.sft_trainer import SFTTrainer

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
# Patterns of paths in the output folder; the files of the tokenizer's vocabulary are added to them.
MODEL_FILES = (
    *(CARD_FILE, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("adapter_config.json", QUANTIZATION_FILE, "*.py"),  # the code of a model that needs `trust_remote_code`
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", TEMPLATE_FILE),
)
EVALUATION_FILES = (
    *(RUN_FILE, RESULTS_FILE, PREVIEW_FILE, REPORT_FILE, TRAINER_STATE_NAME, f"{EVALUATION_DIR}/*.json"),
)


def find_files_to_push(folder: Path, vocabulary_files: Iterable[str], with_evaluation: bool) -> list[str]:
    """Return the paths, relative to the output folder, of the files that are pushed."""
    patterns = [*MODEL_FILES, *vocabulary_files, *(EVALUATION_FILES if with_evaluation else ())]
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def upload_model(
    trainer: SFTTrainer,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    **card_options: Any,
) -> Any:
    """Write the card and upload the files of the output folder, from one process of the run.

    card_options: of `SFTTrainer.create_model_card`. Returns what `upload_folder` of huggingface_hub does: a CommitInfo,
    or a future of it if not `blocking`. Raises SFTError, with the command that uploads the same files, if it fails.
    """
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    if not trainer.is_world_process_zero():
        return None
    trainer.create_model_card(**card_options)
    repository: Any = trainer.hub_model_id
    folder = get_output_dir(args)
    run_as_future: Any = not blocking
    vocabulary_files = getattr(trainer.processing_class, "vocab_files_names", {}).values()
    files = find_files_to_push(folder, vocabulary_files, args.push_evaluation)
    command = ["hf", "upload", repository, str(folder), *(f"--include={name}" for name in files)]
    if args.hub_private_repo:
        command.append("--private")
    with convert_hub_errors(f"{repository} was not uploaded", f"the model is saved; {shlex.join(command)} uploads it"):
        commit = HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            token=token or args.hub_token,
            revision=revision or args.hub_revision,
            run_as_future=run_as_future,
            allow_patterns=files,
        )
    if blocking:
        logger.info("pushed %s files of %s to %s", len(files), folder, commit.commit_url)
    return commit


def build_card(trainer: SFTTrainer, name: str | None = None, license_id: str | None = None) -> ModelCard:
    """Build the model card of a trainer that has trained. Raises SFTError if it has not."""
    results = build_results(trainer)
    name = name or str(trainer.hub_model_id or get_output_dir(trainer.args).absolute()).rpartition("/")[2]
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    dtype, has_adapters = str(model.dtype).removeprefix("torch."), unwrap_peft(model) is not model
    return build_model_card(results, name, dtype, license_id, has_adapters)


@contextmanager
def convert_hub_errors(problem: str, remedy: str) -> Iterator[None]:
    """Convert errors of the hub, the network and the login, which have many types, to SFTError."""
    try:
        yield
    except Exception as error:
        reason = format_error(error)
        if isinstance(error, RuntimeError) and error.__cause__:
            reason += f" {format_error(error.__cause__)}"  # the first only names the file
        raise SFTError(f"push_to_hub: {problem} ({reason}); {remedy}") from error
