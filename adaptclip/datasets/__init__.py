"""Data sets that need no download: drawn, or from scikit-learn."""
