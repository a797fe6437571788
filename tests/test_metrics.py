"""The `evaluate` modules, loaded the way a user loads them, against `router_models.frontier`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import ConfigError, DataError
from router_models import frontier

METRICS_FOLDER = Path(__file__).parent.parent / "metrics"


@pytest.fixture(scope="module")
def apgr() -> Any:
    return loaded("apgr")


@pytest.fixture(scope="module")
def cpt() -> Any:
    return loaded("cpt")


def loaded(name: str) -> Any:
    import evaluate

    return evaluate.load(str(METRICS_FOLDER / name))


def columns(size: int = 300) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rate = rng.random(size)
    return {
        "predictions": rate,
        "weak_quality": (rng.random(size) > rate).astype(float),
        "strong_quality": (rng.random(size) < 0.9).astype(float),
    }


def test_apgr_is_that_of_the_frontier(apgr: Any) -> None:
    data = columns()
    expected = frontier.summary(*data.values())
    found = apgr.compute(**data)
    assert found == {name: expected[name] for name in ("apgr", "apgr_10", "apgr_routellm")}


def test_apgr_loads_by_its_name_from_the_repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.chdir(METRICS_FOLDER.parent)
    found = evaluate.load("metrics/apgr").compute(
        predictions=[0.9, 0.1], weak_quality=[0, 0], strong_quality=[1, 0]
    )
    assert found["apgr"] == pytest.approx(0.75)


def test_cpt_is_that_of_the_frontier(cpt: Any) -> None:
    data = columns()
    found = cpt.compute(**data)
    curve = frontier.cost_quality_curve(*data.values())
    assert found == {"cpt_50": curve.cpt(0.5), "cpt_80": curve.cpt(0.8)}
    assert cpt.compute(**data, pgr=(0.95,)) == {"cpt_95": curve.cpt(0.95)}


def test_batches_add_up(apgr: Any) -> None:
    data = columns()
    for start in range(0, 300, 100):
        apgr.add_batch(**{name: column[start : start + 100] for name, column in data.items()})
    assert apgr.compute() == apgr.compute(**data)


def test_no_gap_is_nan(apgr: Any, cpt: Any) -> None:
    data = {"predictions": [0.9, 0.1], "weak_quality": [1, 1], "strong_quality": [0, 1]}
    assert all(np.isnan(value) for value in apgr.compute(**data).values())
    assert all(np.isnan(value) for value in cpt.compute(**data).values())


def test_bad_input_is_refused_and_the_module_lives_on(apgr: Any, cpt: Any) -> None:
    data = columns()
    with pytest.raises(DataError, match="win rate holds 1 NaN"):
        apgr.compute(**{**data, "predictions": np.append(np.nan, data["predictions"][1:])})
    assert np.isfinite(apgr.compute(**data)["apgr"])
    with pytest.raises(ConfigError, match="PGR mark is 50"):
        cpt.compute(**data, pgr=(50,))


def test_descriptions_say_what_the_numbers_mean(apgr: Any, cpt: Any) -> None:
    assert "performance gap recovered" in apgr.description
    assert "lower is better" in cpt.description
    assert "2406.18665" in apgr.citation
    for metric in (apgr, cpt):
        assert "strong_quality: quality of the strong LLM, one a query.\n" in (
            metric.inputs_description
        )
        assert set(metric.features) == {"predictions", "weak_quality", "strong_quality"}
