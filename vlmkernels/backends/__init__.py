# SPDX-License-Identifier: Apache-2.0
"""The implementations of every operator, one package each. They import torch and their own tools, and never each other."""
