# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses of a batch that two processes share, over gloo, against those of the whole batch in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
def test_two_ranks(tmp_path: Path) -> None:
    """Losses and gradients with every kind of target, and the modules in every mode of open_clip."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    environment |= {"VLMKERNELS_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "contrastive_ranks.py")]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store")], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
