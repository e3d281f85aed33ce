# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses of a batch that two processes share, over gloo, against those of the whole batch in one."""

from pathlib import Path

from conftest import needs_gloo, run_two_ranks


@needs_gloo
def test_two_ranks(tmp_path: Path) -> None:
    """Losses and gradients with every kind of target, and the modules in every mode of open_clip."""
    run_two_ranks("contrastive_ranks.py", tmp_path)
