"""Ways to adapt a frozen CLIP."""
