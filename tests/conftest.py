"""Settings shared by all tests."""

import jax

# Golden traces and plan agreement are proved in float64; float32 tests pass float32 arrays.
jax.config.update("jax_enable_x64", True)
# Stand-ins for a mesh: several CPU devices in one process.
jax.config.update("jax_num_cpu_devices", 8)
