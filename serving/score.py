"""Score queries with a registered router in a process of its own.

MLflow lets code that a process has already imported win over the code that a model brings along,
so a version is judged only in a process that has loaded nothing else. This file is that process's
script too, and so imports nothing of Turnout at its top, not even the errors:
`python -P serving/score.py MODEL_URI QUERIES.json WIN_RATES.json`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory


def win_rates_in_clean_process(
    model_uri: str, queries: Sequence[str], *, tracking_uri: str
) -> list[float]:
    """Return the win rates that the model at ``model_uri`` gives in a fresh interpreter.

    Raises ArtifactError when it cannot be loaded or fails.
    """
    from conf.errors import ArtifactError

    with TemporaryDirectory() as directory:
        asked, answered = Path(directory, "queries.json"), Path(directory, "win_rates.json")
        asked.write_text(json.dumps(list(queries)), encoding="utf-8")
        environment = os.environ | {
            "MLFLOW_TRACKING_URI": tracking_uri,
            "MLFLOW_REGISTRY_URI": tracking_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        # -P: with a script's own folder or the working directory first on the path, this tree
        # could come before the model's code.
        command = [sys.executable, "-P", __file__, model_uri, str(asked), str(answered)]
        ended = subprocess.run(
            command, env=environment, cwd=directory, capture_output=True, text=True, check=False
        )
        if ended.returncode != 0:
            raise ArtifactError(
                f"{model_uri} does not load or score in a clean process:\n{ended.stderr[-2000:]}\n"
                "Expected a router that was logged whole. Train and register it anew."
            )
        return list(json.loads(answered.read_text()))


def main() -> None:
    """Read queries, write win rates; see the module's docstring."""
    model_uri, asked, answered = sys.argv[1:]
    import mlflow

    model = mlflow.pyfunc.load_model(model_uri)
    queries = json.loads(Path(asked).read_text(encoding="utf-8"))
    Path(answered).write_text(json.dumps(model.predict(queries)))


if __name__ == "__main__":
    main()
