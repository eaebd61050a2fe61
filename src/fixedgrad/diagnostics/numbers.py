"""Concrete pytrees as numbers of Python: nothing here is compiled, and NaN and infinity are answers."""

from typing import Any

import jax
import numpy as np

from ..leaves import partition
from ..types import PyTree


@np.errstate(all="ignore")
def inner(a: PyTree, b: PyTree) -> float:
    """The real inner product Re ⟨a, b⟩ over all inexact leaves."""
    pairs = zip(_leaves(a), _leaves(b), strict=True)
    return float(sum(np.vdot(x, y).real for x, y in pairs))


@np.errstate(all="ignore")
def norm(a: PyTree) -> float:
    """The Euclidean norm over all inexact leaves, whatever their scale."""
    leaves = _leaves(a)
    scale = float(np.max([np.max(np.abs(x), initial=0.0) for x in leaves], initial=0.0))
    if scale == 0 or not np.isfinite(scale):
        return scale
    return scale * float(sum(np.sum(np.abs(x / scale) ** 2) for x in leaves)) ** 0.5


@np.errstate(all="ignore")
def difference(a: PyTree, b: PyTree) -> PyTree:
    """The inexact leaves of a − b."""
    return [x - y for x, y in zip(_leaves(a), _leaves(b), strict=True)]


def _leaves(a: PyTree) -> list[np.ndarray]:
    return [_wide(x) for x in jax.tree.leaves(partition(a)[0])]


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(complex if np.iscomplexobj(x) else float)
