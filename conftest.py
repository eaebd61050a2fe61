"""Doctests of the library run in double precision, as the tests do."""

import jax

jax.config.update("jax_enable_x64", True)

collect_ignore_glob = ["docs/*.py"]  # They need the extra `docs`.
