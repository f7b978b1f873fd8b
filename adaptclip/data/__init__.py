# SPDX-License-Identifier: Apache-2.0
"""Data cards, their images, splits and checks."""
