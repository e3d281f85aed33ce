# SPDX-License-Identifier: Apache-2.0
"""The operators and modules inside models of other projects."""
