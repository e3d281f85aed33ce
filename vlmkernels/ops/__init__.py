# SPDX-License-Identifier: Apache-2.0
"""The public operators. Each checks its arguments, then calls one registered op, inside which the backend is chosen."""
