# SPDX-License-Identifier: Apache-2.0
"""torch.nn modules over the operators: parameters and one call each, with the state_dict of the layer they replace."""
