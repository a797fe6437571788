"""LLM routers and the mathematics under them; importable without Prefect and MLflow."""
