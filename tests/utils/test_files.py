"""Files: checksums that sha256sum reads."""

import subprocess

from support.checkpoints import save_checkpoint


def test_sha256sum_reads_the_checksums(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 3)
    run = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=checkpoint, capture_output=True, text=True, check=True)
    assert run.stdout == "model.safetensors: OK\nshards/optimizer.pt: OK\ntrainer_state.json: OK\n"
