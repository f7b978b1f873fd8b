"""Pretrained CLIP models."""
