"""The data sets of the experiments: read from a folder, or fetched once through scikit-learn.

`load(name)` looks for a file in `$FIXEDGRAD_DATA`, then in the cache (`$XDG_CACHE_HOME/fixedgrad`,
by default `~/.cache/fixedgrad`); failing both it fetches the data and writes the file to the cache.

- `parkinsons.data`: the CSV of UCI, with a header: `name`, 22 features and, among them, `status`.
- `news20_removed_counts.npz`, `news20_full_counts.npz`: word counts without and with headers,
  footers and quotes: `data, indices, indptr, shape` of a CSR matrix, `y, n_train, target_names`.
- `mnist_full.npz`, `fashion_mnist_full.npz`: `x_train, y_train, x_test, y_test`, uint8.
"""

import csv
import io
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array


class Dataset(NamedTuple):
    """A labelled data set, as published: neither shuffled nor normalised.

    Attributes:
        x: features, (n, p): float64, float32 in [0, 1] for the MNISTs, a float32 SciPy CSR array
            for news20.
        y: labels 0, ..., c − 1, int32, (n,).
        n_train: the first `n_train` rows are the published training part; n if none is published.
        target_names: what the c labels mean.
    """

    x: Any  # A union would have every user narrow it.
    y: np.ndarray
    n_train: int
    target_names: tuple[str, ...]


class Split(NamedTuple):
    """Row numbers of the three disjoint parts, shuffled except for a published test part."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def load(name: str) -> Dataset:
    """Load a data set by its name, from a file or, the first time, through scikit-learn.

    What is loaded is checked: shapes, class counts, no NaN, and a few published facts.

    Args:
        name: parkinsons, news20, news20_full, mnist, fashion_mnist, breast_cancer or digits.

    Returns:
        The data set, on the host.

    Raises:
        ValueError: the name is unknown, or the data are not what they should be.
        FileNotFoundError: there is no file and no fetching it; says which file to put where.

    Example:
        >>> load("breast_cancer").x.shape
        (569, 30)
    """
    if name in _BUILT_IN:
        return _check(_BUILT_IN[name](), _FACTS[name], f"scikit-learn's `{name}`")
    if name not in _SOURCES:
        raise ValueError(f"`name` must be one of {', '.join(_FACTS)}; got {name!r}.")
    source, facts = _SOURCES[name], _FACTS[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fixedgrad"
    folders = [Path(f).expanduser() for f in [os.environ.get("FIXEDGRAD_DATA")] if f] + [cache]
    for path in [folder / source.file for folder in folders]:
        if path.is_file():
            with path.open("rb") as file:
                return _read(source, facts, file, str(path))

    print(f"Fetching {name} through scikit-learn into {cache / source.file}", file=sys.stderr)
    fetched = io.BytesIO()
    try:
        source.fetch(fetched)
    except Exception as error:  # Whatever scikit-learn, the network or the disk may raise.
        raise FileNotFoundError(
            f"`{source.file}` is not in {' or '.join(map(str, folders))}, and fetching it failed "
            f"({type(error).__name__}: {error}). Put `{source.file}` into {cache}, or into a "
            f"folder that the environment variable FIXEDGRAD_DATA names. Where there is a network, "
            f"`load({name!r})` writes it to the cache."
        ) from error
    dataset = _read(source, facts, io.BytesIO(fetched.getvalue()), f"fetched `{source.file}`")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        path = Path(folder, source.file)
        path.write_bytes(fetched.getvalue())
        path.replace(cache / source.file)  # Atomic: the cache never holds half a file.
    return dataset


def split(seed: int, n: int, sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Disjoint random parts of range(n): one array of row numbers for each of `sizes`."""
    if min(sizes) < 0 or sum(sizes) > n:
        raise ValueError(f"`sizes` must be non-negative and sum to at most n = {n}, got {sizes}.")
    order = np.random.default_rng(seed).permutation(n)
    return tuple(np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1]))


def by_date(seed: int, dataset: Dataset) -> Split:
    """The published test part, and random halves of the training part; news20: 5657, 5657, 7532."""
    n, n_train = len(dataset.y), dataset.n_train
    train, validation = split(seed, n_train, (n_train // 2, n_train - n_train // 2))
    return Split(train, validation, np.arange(n_train, n))


def thirds(seed: int, dataset: Dataset) -> Split:
    """Random thirds of all rows, published parts mixed; the test part takes the remainder."""
    n = len(dataset.y)
    return Split(*split(seed, n, (n // 3, n // 3, n - 2 * (n // 3))))


def standardise(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Give columns mean 0 and deviation 1 on `train`; a constant column is only shifted."""
    mean, scale = train.mean(axis=0, keepdims=True), train.std(axis=0, keepdims=True)
    scale[np.ptp(train, axis=0, keepdims=True) == 0] = 1  # There rounding may leave a tiny scale.
    return tuple((a - mean) / scale for a in (train, *others))


def normalise_rows(x: csr_array) -> csr_array:
    """Divide each row of a CSR array by its Euclidean norm; an empty row stays empty."""
    n = len(x.indptr) - 1
    row = np.repeat(np.arange(n), np.diff(x.indptr))
    norm = np.sqrt(np.bincount(row, np.square(x.data, dtype=np.float64), minlength=n))
    norm[norm == 0] = 1
    return csr_array(((x.data / norm[row]).astype(x.dtype), x.indices, x.indptr), shape=x.shape)


class _Source(NamedTuple):
    file: str
    fetch: Callable[[IO[bytes]], None]  # Writes the file.
    read: Callable[[IO[bytes]], Dataset]


class _Facts(NamedTuple):
    shape: tuple[int, int]
    n_train: int
    counts: str  # Of the classes in the training part.
    mean: float | None = None  # Of x in the training part, to four digits.
    empty_rows: tuple[int, int] | None = None  # In the training and in the test part.


def _read(source: _Source, facts: _Facts, file: IO[bytes], where: str) -> Dataset:
    try:
        dataset = source.read(file)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{where} cannot be read as `{source.file}`: {error!r}.") from error
    return _check(dataset, facts, where)


def _check(dataset: Dataset, facts: _Facts, where: str) -> Dataset:
    def expect(what: str, expected: object, got: object) -> None:
        if expected != got:
            raise ValueError(f"{where}: expected {what} to be {expected}, got {got}.")

    x, y, n_train, target_names = dataset
    expect("the shape of the features", facts.shape, x.shape)
    expect("the shape of the labels", facts.shape[:1], y.shape)
    expect("the number of training rows", facts.n_train, n_train)
    expect("the number of classes", len(facts.counts.split()), len(target_names))
    counts = " ".join(map(str, np.bincount(y[:n_train])))
    expect("the class counts of the training part", facts.counts, counts)
    values = x.data if isinstance(x, csr_array) else x
    expect("the number of NaN or infinite features", 0, int(np.sum(~np.isfinite(values))))
    if facts.mean is not None:
        mean = round(float(x[:n_train].mean(dtype=np.float64)), 4)
        expect("the mean training feature", facts.mean, mean)
    if facts.empty_rows is not None and isinstance(x, csr_array):
        empty = np.diff(x.indptr) == 0
        got = int(empty[:n_train].sum()), int(empty[n_train:].sum())
        expect("the numbers of empty training and test rows", facts.empty_rows, got)
    return dataset


_UCI_COLUMNS = """
    name MDVP:Fo(Hz) MDVP:Fhi(Hz) MDVP:Flo(Hz) MDVP:Jitter(%) MDVP:Jitter(Abs) MDVP:RAP MDVP:PPQ
    Jitter:DDP MDVP:Shimmer MDVP:Shimmer(dB) Shimmer:APQ3 Shimmer:APQ5 MDVP:APQ Shimmer:DDA NHR HNR
    status RPDE DFA spread1 spread2 D2 PPE
""".split()


def _fetch_parkinsons(file: IO[bytes]) -> None:
    from sklearn import datasets

    # OpenML keeps UCI's order of features, drops `name` and codes the status 0, 1 as "1", "2".
    bunch: Any = datasets.fetch_openml("parkinsons", version=1, as_frame=False)
    lines = [",".join(_UCI_COLUMNS)]
    for x, label in zip(bunch.data.tolist(), bunch.target, strict=True):
        lines.append(",".join(["?", *map(repr, x[:16]), str(int(label) - 1), *map(repr, x[16:])]))
    file.write("\n".join([*lines, ""]).encode())


def _read_parkinsons(file: IO[bytes]) -> Dataset:
    rows = list(csv.DictReader(file.read().decode().splitlines()))
    x = [[float(v) for k, v in row.items() if k not in ("name", "status")] for row in rows]
    y = np.array([int(row["status"]) for row in rows], np.int32)
    return Dataset(np.array(x), y, len(y), ("healthy", "parkinson"))


def _fetch_news20(remove: tuple[str, ...], file: IO[bytes]) -> None:
    from sklearn import datasets
    from sklearn.feature_extraction.text import CountVectorizer

    texts, labels, names = [], [], []
    for subset in ("train", "test"):
        bunch: Any = datasets.fetch_20newsgroups(subset=subset, shuffle=False, remove=remove)
        # scikit-learn's copy is shuffled once and for all. The archive's order: class, file name.
        order = np.lexsort(([Path(f).name for f in bunch.filenames], bunch.target))
        texts.append([bunch.data[i] for i in order])
        labels.append(bunch.target[order])
        names = bunch.target_names
    counts = CountVectorizer().fit(texts[0]).transform(texts[0] + texts[1])
    np.savez_compressed(
        file,
        data=counts.data.astype(np.uint16),
        indices=counts.indices.astype(np.int32),
        indptr=counts.indptr.astype(np.int32),
        shape=np.array(counts.shape),
        y=np.concatenate(labels).astype(np.uint8),
        n_train=np.array(len(texts[0])),
        target_names=np.array(names),
    )


def _read_news20(file: IO[bytes]) -> Dataset:
    with np.load(file) as z:
        parts = z["data"].astype(np.float32), z["indices"], z["indptr"]
        x = csr_array(parts, shape=tuple(z["shape"].tolist()))
        x.sort_indices()
        names = tuple(z["target_names"].tolist())
        return Dataset(x, z["y"].astype(np.int32), int(z["n_train"]), names)


def _fetch_images(name: str, file: IO[bytes]) -> None:
    from sklearn import datasets

    bunch: Any = datasets.fetch_openml(name, version=1, as_frame=False)
    x, y, n = bunch.data.astype(np.uint8), bunch.target.astype(np.uint8), 60000
    np.savez_compressed(file, x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:])


def _read_images(target_names: tuple[str, ...], file: IO[bytes]) -> Dataset:
    with np.load(file) as z:
        x = np.concatenate([z["x_train"], z["x_test"]])
        y = np.concatenate([z["y_train"], z["y_test"]]).astype(np.int32)
        return Dataset(np.divide(x, 255, dtype=np.float32), y, len(z["y_train"]), target_names)


def _built_in(name: str) -> Dataset:
    from sklearn import datasets

    bunch: Any = getattr(datasets, f"load_{name}")()
    names = tuple(map(str, bunch.target_names))
    return Dataset(bunch.data, bunch.target.astype(np.int32), len(bunch.target), names)


_CLOTHES = "T-shirt,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
_fetch_removed = partial(_fetch_news20, ("headers", "footers", "quotes"))
_fetch_full = partial(_fetch_news20, ())
_fetch_mnist = partial(_fetch_images, "mnist_784")
_fetch_fashion = partial(_fetch_images, "Fashion-MNIST")
_read_mnist = partial(_read_images, tuple("0123456789"))
_read_fashion = partial(_read_images, tuple(_CLOTHES))
_BUILT_IN = {name: partial(_built_in, name) for name in ("breast_cancer", "digits")}
_SOURCES = {
    "parkinsons": _Source("parkinsons.data", _fetch_parkinsons, _read_parkinsons),
    "news20": _Source("news20_removed_counts.npz", _fetch_removed, _read_news20),
    "news20_full": _Source("news20_full_counts.npz", _fetch_full, _read_news20),
    "mnist": _Source("mnist_full.npz", _fetch_mnist, _read_mnist),
    "fashion_mnist": _Source("fashion_mnist_full.npz", _fetch_fashion, _read_fashion),
}
_NEWS20 = "480 584 591 590 578 593 585 594 598 597 600 595 591 594 593 599 546 564 465 377"
_MNIST = "5923 6742 5958 6131 5842 5421 5918 6265 5851 5949"
_FACTS = {
    "parkinsons": _Facts((195, 22), 195, "48 147"),
    "news20": _Facts((18846, 101631), 11314, _NEWS20, empty_rows=(311, 224)),
    "news20_full": _Facts((18846, 130107), 11314, _NEWS20, empty_rows=(0, 0)),
    "mnist": _Facts((70000, 784), 60000, _MNIST, mean=0.1307),
    "fashion_mnist": _Facts((70000, 784), 60000, " ".join(["6000"] * 10), mean=0.2860),
    "breast_cancer": _Facts((569, 30), 569, "212 357"),
    "digits": _Facts((1797, 64), 1797, "178 182 177 183 181 182 181 179 174 180"),
}
