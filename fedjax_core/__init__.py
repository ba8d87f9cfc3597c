"""The compiled core: populations, cohorts, client programs, execution plans, simulation.

Knows no paper, no data set and no neural-network library.
"""

from importlib.metadata import PackageNotFoundError, version

from fedjax_core import checks, keys, linalg, masks, samplers, shuffle, sums, testing
from fedjax_core.aggregation import (
    Aggregator,
    Stacked,
    client_weights,
    mapped,
    stacked,
    weighted_mean,
    weighted_sum,
)
from fedjax_core.algorithm import (
    Algorithm,
    ModelState,
    checked_round,
    federated,
    global_algorithm,
    global_client_params,
)
from fedjax_core.batching import Batch, LocalOptions, LocalWork, local_work
from fedjax_core.clients import (
    ClientProgram,
    ClientResults,
    ClientTable,
    LocalTraining,
    client_table,
    for_each_client,
    gather,
    join_tables,
    kept_by_client,
    local_training,
    mean_over_participants,
    num_scalars,
    round_metrics,
    scatter,
    split_tables,
)
from fedjax_core.evaluation import (
    ClientStatistics,
    Weighted,
    client_statistics,
    evaluate,
    evaluate_clients,
    evaluate_examples,
    evaluate_personal,
    is_weighted,
    metric_values,
)
from fedjax_core.gradients import (
    ClientOptimizer,
    Descent,
    add_scaled,
    batch_loss,
    first_part,
    full_gradient_program,
    local_descent,
    optimizer_at,
    optimizer_step,
    scale,
    value_and_grad,
)
from fedjax_core.lanes import num_bytes
from fedjax_core.lengths import Measured, first_length, measured, per_length
from fedjax_core.partition import Hole, combine, leaf_paths, partition
from fedjax_core.placement import client_mesh, place, replicated, shardings
from fedjax_core.plans import Plan
from fedjax_core.population import Cohort, Population
from fedjax_core.samplers import Sampler, ValidSampler
from fedjax_core.simulation import continue_rounds, simulate
from fedjax_core.staging import HostPopulation, Interrupted, continue_staged, init_on_host, simulate_staged
from fedjax_core.tuning import Trial, needed_memory, out_of_memory, try_plans
from fedjax_core.types import (
    Array,
    ArrayLike,
    Counter,
    Examples,
    Key,
    LossFn,
    Metrics,
    Params,
    PyTree,
    Scalar,
    Weights,
)

try:
    __version__ = version("fedjax-core")
except PackageNotFoundError:  # a source tree on the path that is not installed
    __version__ = "0+source"

__all__ = [
    "Aggregator",
    "Algorithm",
    "Array",
    "ArrayLike",
    "Batch",
    "ClientOptimizer",
    "ClientProgram",
    "ClientResults",
    "ClientStatistics",
    "ClientTable",
    "Cohort",
    "Counter",
    "Descent",
    "Examples",
    "Hole",
    "HostPopulation",
    "Interrupted",
    "Key",
    "LocalOptions",
    "LocalTraining",
    "LocalWork",
    "LossFn",
    "Measured",
    "Metrics",
    "ModelState",
    "Params",
    "Plan",
    "Population",
    "PyTree",
    "Sampler",
    "Scalar",
    "Stacked",
    "Trial",
    "ValidSampler",
    "Weighted",
    "Weights",
    "__version__",
    "add_scaled",
    "batch_loss",
    "checked_round",
    "checks",
    "client_mesh",
    "client_statistics",
    "client_table",
    "client_weights",
    "combine",
    "continue_rounds",
    "continue_staged",
    "evaluate",
    "evaluate_clients",
    "evaluate_examples",
    "evaluate_personal",
    "federated",
    "first_length",
    "first_part",
    "for_each_client",
    "full_gradient_program",
    "gather",
    "global_algorithm",
    "global_client_params",
    "init_on_host",
    "is_weighted",
    "join_tables",
    "kept_by_client",
    "keys",
    "leaf_paths",
    "linalg",
    "local_descent",
    "local_training",
    "local_work",
    "mapped",
    "masks",
    "mean_over_participants",
    "measured",
    "metric_values",
    "needed_memory",
    "num_bytes",
    "num_scalars",
    "optimizer_at",
    "optimizer_step",
    "out_of_memory",
    "partition",
    "per_length",
    "place",
    "replicated",
    "round_metrics",
    "samplers",
    "scale",
    "scatter",
    "shardings",
    "shuffle",
    "simulate",
    "simulate_staged",
    "split_tables",
    "stacked",
    "sums",
    "testing",
    "try_plans",
    "value_and_grad",
    "weighted_mean",
    "weighted_sum",
]
