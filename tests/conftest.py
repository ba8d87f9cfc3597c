"""Settings shared by all tests."""

import os

# Tests compile far more than they compute, so the processor's backend is told not to polish what it makes.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)

import jax

# Golden traces and plan agreement are proved in float64; float32 tests pass float32 arrays.
jax.config.update("jax_enable_x64", True)
# Stand-ins for a mesh: several CPU devices in one process.
jax.config.update("jax_num_cpu_devices", 8)
