"""adaptclip: adapt a pretrained CLIP to a custom domain and judge, with statistics, whether it may be released."""

import os

# albumentations asks the package index for updates when it is imported; a library must not do that unasked.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"
