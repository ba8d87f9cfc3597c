"""The compiled core: populations, cohorts, client programs, execution plans, simulation.

Knows no paper, no data set and no neural-network library.
"""

from fedjax_core import checks, keys, linalg, samplers, shuffle, sums
from fedjax_core.aggregation import Aggregator, client_weights, mapped, weighted_mean, weighted_sum
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
    local_training,
    num_scalars,
    round_metrics,
    scatter,
    split_tables,
)
from fedjax_core.evaluation import (
    Spread,
    evaluate,
    evaluate_clients,
    evaluate_examples,
    evaluate_personal,
    spread,
)
from fedjax_core.execution import num_bytes
from fedjax_core.gradients import (
    ClientOptimizer,
    Length,
    batch_loss,
    descend,
    full_gradient_program,
    move,
    optimizer_at,
    value_and_grad,
)
from fedjax_core.placement import client_mesh, everywhere, place, shardings
from fedjax_core.plans import Plan
from fedjax_core.population import Cohort, Population
from fedjax_core.samplers import Sampler
from fedjax_core.simulation import continue_rounds, simulate
from fedjax_core.staging import HostPopulation, Interrupted, continue_staged, init_on_host, simulate_staged
from fedjax_core.tuning import Trial, needed_memory, out_of_memory, try_plans
from fedjax_core.types import (
    Algorithm,
    Array,
    Examples,
    Key,
    LossFn,
    Metrics,
    Params,
    PyTree,
    Scalar,
    global_algorithm,
    global_client_params,
)

__all__ = [
    "Aggregator",
    "Algorithm",
    "Array",
    "Batch",
    "ClientOptimizer",
    "ClientProgram",
    "ClientResults",
    "ClientTable",
    "Cohort",
    "Examples",
    "HostPopulation",
    "Interrupted",
    "Key",
    "Length",
    "LocalOptions",
    "LocalTraining",
    "LocalWork",
    "LossFn",
    "Metrics",
    "Params",
    "Plan",
    "Population",
    "PyTree",
    "Sampler",
    "Scalar",
    "Spread",
    "Trial",
    "batch_loss",
    "checks",
    "client_mesh",
    "client_table",
    "client_weights",
    "continue_rounds",
    "continue_staged",
    "descend",
    "evaluate",
    "evaluate_clients",
    "evaluate_examples",
    "evaluate_personal",
    "everywhere",
    "for_each_client",
    "full_gradient_program",
    "gather",
    "global_algorithm",
    "global_client_params",
    "init_on_host",
    "join_tables",
    "keys",
    "linalg",
    "local_training",
    "local_work",
    "mapped",
    "move",
    "needed_memory",
    "num_bytes",
    "num_scalars",
    "optimizer_at",
    "out_of_memory",
    "place",
    "round_metrics",
    "samplers",
    "scatter",
    "shardings",
    "shuffle",
    "simulate",
    "simulate_staged",
    "split_tables",
    "spread",
    "sums",
    "try_plans",
    "value_and_grad",
    "weighted_mean",
    "weighted_sum",
]
