"""Hugging Face `evaluate` modules: one folder each, loaded by `evaluate.load("metrics/NAME")`."""
