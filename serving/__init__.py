"""Serving: the MLflow model of a router, and what loads it."""
