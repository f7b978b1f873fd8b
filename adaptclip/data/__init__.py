"""Data cards, their images, splits and checks."""
