"""`turnout benchmark`: train routers on known answers and judge them on others."""

from prefect import flow

from conf.schema import Benchmark
from tasks.benchmark import BenchmarkReport, benchmark_data, publish_benchmark
from tasks.evaluation import compare_routers
from tasks.tracking import parent_run
from tasks.training import train_router
from tasks.warehouse import Warehouse


@flow(name="benchmark", flow_run_name="{settings.name}", validate_parameters=True)
def benchmark(settings: Benchmark) -> BenchmarkReport:
    """Compare routers on the answers in a folder; random and oracle stand beside them."""
    store, seed = settings.store, settings.seed
    with parent_run(settings, kind="benchmark") as run_id:
        data = benchmark_data(Warehouse(store.directory), settings)
        trained = [
            train_router(
                store,
                data.queries,
                router,
                evaluation=data.evaluation,
                seed=seed,
                parent_id=run_id,
                battles=data.battles,
                served=False,
            )
            for router in settings.routers
        ]
        comparison = compare_routers(
            store,
            data.queries,
            trained,
            None,
            metric="correct",
            settings=data.evaluation,
            seed=seed,
            parent_id=run_id,
        )
        return publish_benchmark(settings, data, comparison, trained, run_id)
