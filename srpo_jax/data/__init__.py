"""Prompts and images as training data."""
