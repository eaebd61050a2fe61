"""Double precision, no implicit promotion, eight simulated devices, fixed keys.

Nothing here is timed, and most of the time goes into compiling: LLVM optimises little.
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatch

# Read when the first JAX backend starts, hence before anything that computes.
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _FLAGS:
    os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rows that `slow(but=...)` names by patterns are quick: each kind of row in one place at least."""
    for item in items:
        quick = [m for m in item.own_markers if m.name == "slow" and "but" in m.kwargs]
        row = item.name.partition("[")[2].removesuffix("]")
        if any(fnmatch(row, pattern) for m in quick for pattern in m.kwargs["but"]):
            item.own_markers = [m for m in item.own_markers if m not in quick]


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_file_at_a_time() -> Iterator[None]:
    """What one file has compiled goes with it: a worker would grow to some gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(20200713)
