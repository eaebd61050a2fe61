"""Double precision, no implicit promotion, eight simulated devices, fixed keys.

Nothing here is timed, and most of the time goes into compiling: LLVM optimises little.
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatch

import jax
import pytest
from hypothesis import settings

# Read when the first JAX backend starts, hence before anything that computes.
_FLAGS = ["--xla_force_host_platform_device_count=8"]
if jax.__version_info__ < (0, 11):  # Later ones do not know it. It halves the time of compiling.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
for _flag in _FLAGS:
    if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

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
