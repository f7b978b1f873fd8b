# SPDX-License-Identifier: Apache-2.0
"""Puts the recipes and the data cards, which lie at the top of the project, into the installed package.

Everything else about the package is in pyproject.toml, which has no way to say this beside a search for packages.
"""

from setuptools import find_namespace_packages, setup

AT_THE_TOP = {
    "adaptclip.recipes": "recipes",
    "adaptclip.recipes.figures": "recipes/figures",
    "adaptclip.data_cards": "data_cards",
}

setup(
    packages=[*find_namespace_packages(include=["adaptclip", "adaptclip.*"], exclude=["*.__pycache__"]), *AT_THE_TOP],
    package_dir=AT_THE_TOP,
)
