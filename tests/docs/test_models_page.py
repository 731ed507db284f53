"""The table of docs/models.md names tests that exist, and the families that they cover."""

import re
from pathlib import Path

from support import model_kinds

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ") and "| `test_" in line]
TESTS = {
    name for path in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
}


def test_every_named_test_exists():
    names = set(re.findall(r"`(test_\w+)`", TEXT))
    assert names and names <= TESTS
    assert [len(row) for row in ROWS] == [4] * len(ROWS) and all(all(row) for row in ROWS)


def test_every_test_of_a_kind_is_named():
    code = (ROOT / "tests" / "model" / "test_model_kinds.py").read_text(encoding="utf-8")
    # Those that say more about a kind which has a row.
    details = {"test_a_router_loss_is_weighted_by_the_targets_of_its_batch"}
    details |= {"test_parameters_that_text_does_not_reach_cannot_be_trained_alone"}
    assert set(re.findall(r"^def (test_\w+)", code, re.M)) - details == {
        name for name in re.findall(r"`(test_\w+)`", TEXT) if name in code
    }


def test_the_tested_families_are_named():
    families = {row[3].strip("`"): row[1] for row in ROWS}
    tested = {
        "test_experts_are_packed": model_kinds.EXPERTS_PACKED,
        "test_a_router_loss_is_added_to_the_padded_batch": model_kinds.ROUTER_LOSS,
        "test_a_window_is_packed": model_kinds.WINDOWS,
        "test_a_window_of_the_mask_alone_is_padded": model_kinds.MASKED_WINDOWS,
        "test_soft_capping_and_sinks_are_padded": model_kinds.CHANGED_SCORES,
        "test_linear_attention_is_padded": model_kinds.LINEAR_ATTENTION,
        "test_a_bias_of_the_scores_is_padded": model_kinds.ALIBI,
        "test_a_head_that_cannot_be_split_off_is_computed_everywhere": model_kinds.LLAMA4,
        "test_towers_for_images_are_frozen_and_the_text_model_is_packed": model_kinds.WITH_TOWERS,
        "test_a_model_that_is_not_causal_is_refused": model_kinds.NOT_CAUSAL,
    }
    for test, models in tested.items():
        assert sorted(families[test].split(", ")) == sorted(models), test
