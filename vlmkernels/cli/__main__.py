# SPDX-License-Identifier: Apache-2.0
"""``python -m vlmkernels.cli``: the command line without the installed script."""

import sys

from vlmkernels.cli import main

sys.exit(main())
