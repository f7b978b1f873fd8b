# SPDX-License-Identifier: Apache-2.0
"""What a visible training loop needs and gets wrong easily."""
