# SPDX-License-Identifier: Apache-2.0
"""Training an accelerated model: on several ranks, with adapters, gradient checkpointing and autocast."""

from pathlib import Path

from conftest import needs_gloo, run_two_ranks


@needs_gloo
def test_two_ranks_give_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    """Under DistributedDataParallel, and with fully_shard before accelerate and after."""
    run_two_ranks("accelerate_ranks.py", tmp_path)
