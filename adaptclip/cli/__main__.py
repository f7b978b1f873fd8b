# SPDX-License-Identifier: Apache-2.0
"""`python -m adaptclip.cli`."""

from adaptclip.cli import main

if __name__ == "__main__":
    main()
