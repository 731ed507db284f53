"""What the tests of a run's folders share."""

import pytest
from support.permissions import public

from sft_pipeline.config import parse_config
from sft_pipeline.runs.output_dir import check_output_dir

__all__ = ["check", "public"]


@pytest.fixture
def check(tmp_path):
    """check("auto") is the checkpoint that a run in tmp_path/out resumes from."""

    def get_checkpoint(key: str, *keys: str):
        words = ["--model_name_or_path=m", "--train_data=d", "--use_cpu=true", f"--output_dir={tmp_path / 'out'}"]
        args = parse_config(None, [*words, f"--resume_from_checkpoint={key}", *keys])
        return check_output_dir(args)

    return get_checkpoint
