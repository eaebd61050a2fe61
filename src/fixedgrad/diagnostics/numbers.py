"""Concrete pytrees as numbers of Python: nothing here is compiled."""

from typing import Any

import jax
import numpy as np

from ..leaves import is_inexact
from ..types import PyTree


def inner(a: PyTree, b: PyTree) -> float:
    """The real inner product Re ⟨a, b⟩ over all inexact leaves."""
    pairs = zip(_leaves(a), _leaves(b), strict=True)
    return float(sum(np.vdot(x, y).real for x, y in pairs))


def norm(a: PyTree) -> float:
    """The Euclidean norm over all inexact leaves."""
    return inner(a, a) ** 0.5


def difference(a: PyTree, b: PyTree) -> PyTree:
    """The inexact leaves of a − b."""
    return [x - y for x, y in zip(_leaves(a), _leaves(b), strict=True)]


def _leaves(a: PyTree) -> list[np.ndarray]:
    return [_wide(x) for x in jax.tree.leaves(a) if is_inexact(x)]


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(complex if np.iscomplexobj(x) else float)
