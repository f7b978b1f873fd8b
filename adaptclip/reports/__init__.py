"""Reports on predictions."""
