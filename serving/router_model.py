"""The registered form of a router: an MLflow pyfunc from code, over safetensors and JSON.

MLflow copies this file and `router_models` next to the weights, so that a registered version is
whole by itself. `predict` takes queries and gives their win rates.
"""

from pathlib import Path

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

from router_models.catalog import load_router


class RouterModel(PythonModel):
    """Win rates of queries: the probability that the strong LLM is needed."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the router that was logged with this model."""
        self.router = load_router(Path(context.artifacts["router"]))

    def predict(self, model_input: list[str]) -> list[float]:  # type: ignore[override]
        """Return one win rate in [0, 1] for each query."""
        return [float(rate) for rate in self.router.win_rate(list(model_input))]


mlflow.models.set_model(RouterModel())
