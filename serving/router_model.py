"""The registered form of a router: an MLflow pyfunc from code, over safetensors and JSON.

MLflow copies this file and `router_models` next to the weights, so that a registered version is
whole by itself. `predict` takes queries and gives their win rates, or, with the parameters
{"policy": "pool", "margin": 0.05}, the name of the LLM that each query should go to. What LLMs
cost is stored with the model and can be replaced when it is loaded:
`mlflow.pyfunc.load_model(uri, model_config={"cost_usd": {"small": 0.0002, "large": 0.01}})`.
"""

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

from conf.errors import ConfigError, unknown_name
from router_models.catalog import load_router
from router_models.pool import PoolPolicy

POLICIES = ("win_rate", "pool")


class RouterModel(PythonModel):
    """Win rates of queries: the probability that the strong LLM is needed; or LLMs by name."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the router that was logged with this model, and what its LLMs cost."""
        self.router = load_router(Path(context.artifacts["router"]))
        self.cost_usd: dict[str, float] = dict((context.model_config or {}).get("cost_usd", {}))

    def predict(  # type: ignore[override]
        self, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[float] | list[str]:
        """Return one win rate in [0, 1], or with policy "pool" one LLM's name, for each query.

        Raises ConfigError for an unknown policy, for a margin that is none, and where the router
        cannot compare the LLMs or does not know what they cost.
        """
        chosen: dict[str, Any] = {"policy": "win_rate", "margin": 0.0} | (params or {})
        if chosen["policy"] not in POLICIES:
            raise ConfigError(
                unknown_name("policy", str(chosen["policy"]), POLICIES) + " Set params.policy."
            )
        if chosen["policy"] == "win_rate":
            return [float(rate) for rate in self.router.win_rate(list(model_input))]
        if not self.cost_usd:
            raise ConfigError(
                "This model was logged without the cost of its LLMs. Expected US dollars for one "
                "query of each to choose by. Load it with model_config={'cost_usd': {LLM: USD}}."
            )
        policy = PoolPolicy(self.cost_usd, margin=float(chosen["margin"]))
        return policy.choose(self.router, list(model_input))


mlflow.models.set_model(RouterModel())
