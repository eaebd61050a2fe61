"""The data layer of the experiments: loading, splitting, and products with a sparse matrix."""

import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from experiments.problems import data, sparse

datasets = pytest.importorskip("sklearn.datasets")


def forbid(*args, **kwargs):
    raise OSError(f"no network in tests: {args} {kwargs}")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(datasets, "fetch_openml", forbid)
    monkeypatch.setattr(datasets, "fetch_20newsgroups", forbid)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and no folder of files."""
    monkeypatch.delenv("FIXEDGRAD_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fixedgrad"


def real(name):
    """The real data set, or a skip that says which file is missing."""
    try:
        return data.load(name)
    except FileNotFoundError as error:
        pytest.skip(str(error).split(", and fetching")[0])


def parkinsons_of_openml(seed=0):
    rng = np.random.default_rng(seed)
    target = np.array(["2"] * 147 + ["1"] * 48, dtype=object)
    return SimpleNamespace(data=rng.standard_normal((195, 22)), target=target)


def images_of_openml(counts):
    y = np.repeat(np.arange(10), counts)
    y = np.concatenate([y, np.arange(10).repeat(1000)])
    x = np.full((len(y), 3), 33.0)
    x[:, 0] = np.arange(len(y)) % 256
    return SimpleNamespace(data=x, target=y.astype(str).astype(object))


# Loading.


@pytest.mark.parametrize("name", ["parkinsons", "news20", "news20_full", "mnist", "fashion_mnist"])
def test_a_real_data_set_passes_its_checks_and_has_the_documented_types(name):
    x, y, n_train, target_names = real(name)
    assert y.dtype == np.int32
    assert set(np.unique(y)) == set(range(len(target_names)))
    assert 0 < n_train <= len(y)
    assert x.dtype == (np.float64 if name == "parkinsons" else np.float32)
    if name.endswith("mnist"):
        assert (x.min(), x.max()) == (0, 1)
    if name.startswith("news20"):
        assert isinstance(x, sp.csr_array)
        assert x.has_sorted_indices
        assert np.all(np.diff(y[:n_train]) >= 0)


@pytest.mark.parametrize(("name", "classes"), [("breast_cancer", 2), ("digits", 10)])
def test_data_inside_scikit_learn_need_no_file(cache, name, classes):
    dataset = data.load(name)
    assert len(dataset.target_names) == classes
    assert dataset.n_train == len(dataset.x) == len(dataset.y)
    assert not cache.exists()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"one of parkinsons, news20.*; got 'cifar'"):
        data.load("cifar")


def test_a_missing_file_offline_says_which_file_to_put_where(cache):
    with pytest.raises(FileNotFoundError) as info:
        data.load("mnist")
    message = str(info.value)
    assert f"Put `mnist_full.npz` into {cache}" in message
    assert "FIXEDGRAD_DATA" in message
    assert "OSError: no network in tests" in message
    assert not cache.exists()


def test_a_failed_fetch_names_every_folder_that_was_searched(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("FIXEDGRAD_DATA", str(tmp_path / "files"))
    with pytest.raises(FileNotFoundError, match=f"not in {tmp_path / 'files'} or {cache}"):
        data.load("news20")


@pytest.mark.usefixtures("cache")
def test_the_cache_is_under_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / ".cache" / "fixedgrad")):
        data.load("parkinsons")


def test_a_fetched_data_set_is_announced_cached_and_not_fetched_again(cache, monkeypatch, capsys):
    bunch = parkinsons_of_openml()
    monkeypatch.setattr(datasets, "fetch_openml", lambda *_, **__: bunch)
    first = data.load("parkinsons")
    assert "Fetching parkinsons" in capsys.readouterr().err
    np.testing.assert_array_equal(first.x, bunch.data)
    np.testing.assert_array_equal(first.y, [1] * 147 + [0] * 48)
    assert [f.name for f in cache.iterdir()] == ["parkinsons.data"]

    monkeypatch.setattr(datasets, "fetch_openml", forbid)
    second = data.load("parkinsons")
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(second.x, first.x)
    np.testing.assert_array_equal(second.y, first.y)


def test_the_named_folder_comes_before_the_cache(cache, monkeypatch, tmp_path):
    for folder, seed in ((tmp_path / "files", 1), (cache, 0)):
        buffer, bunch = io.BytesIO(), parkinsons_of_openml(seed)
        monkeypatch.setattr(datasets, "fetch_openml", lambda *_, bunch=bunch, **__: bunch)
        data._SOURCES["parkinsons"].fetch(buffer)
        folder.mkdir(parents=True)
        (folder / "parkinsons.data").write_bytes(buffer.getvalue())
    np.testing.assert_array_equal(data.load("parkinsons").x, parkinsons_of_openml(0).data)
    monkeypatch.setenv("FIXEDGRAD_DATA", str(tmp_path / "files"))
    np.testing.assert_array_equal(data.load("parkinsons").x, parkinsons_of_openml(1).data)


def test_a_wrong_fetch_is_refused_and_never_reaches_the_cache(cache, monkeypatch):
    bunch = parkinsons_of_openml()
    bunch.target[:] = "1"
    monkeypatch.setattr(datasets, "fetch_openml", lambda *_, **__: bunch)
    with pytest.raises(ValueError, match=r"fetched `parkinsons.data`: expected the class counts"):
        data.load("parkinsons")
    assert not cache.exists()


def test_fetched_images_are_split_and_scaled(cache, monkeypatch):
    bunch = images_of_openml([6000] * 10)
    mean = round(float(bunch.data[:60000].mean() / 255), 4)
    facts = data._Facts((70000, 3), 60000, " ".join(["6000"] * 10), mean=mean)
    monkeypatch.setitem(data._FACTS, "fashion_mnist", facts)
    monkeypatch.setattr(datasets, "fetch_openml", lambda *_, **__: bunch)
    dataset = data.load("fashion_mnist")
    np.testing.assert_allclose(dataset.x, bunch.data / 255, rtol=1e-6)
    np.testing.assert_array_equal(dataset.y, bunch.target.astype(int))
    with np.load(cache / "fashion_mnist_full.npz") as z:
        assert sorted(z) == ["x_test", "x_train", "y_test", "y_train"]
        assert z["x_train"].dtype == z["y_test"].dtype == np.uint8
        assert z["x_test"].shape == (10000, 3)


@pytest.mark.usefixtures("cache")
def test_fetched_texts_are_counted_in_the_order_of_class_and_file_name(monkeypatch):
    parts = {
        "train": (["b b b", "a c", "", "a a"], [1, 0, 0, 0], ["x/7", "x/9", "x/10", "x/8"]),
        "test": (["zebra c c", "b"], [1, 0], ["x/2", "x/1"]),
    }

    def fetch(subset, shuffle, remove):
        assert not shuffle
        assert remove == ("headers", "footers", "quotes")
        texts, target, files = parts[subset]
        texts = [
            " ".join(2 * word for word in text.split()) for text in texts
        ]  # Words, not letters.
        names = ["first", "second"]
        return SimpleNamespace(
            data=texts, target=np.array(target), filenames=files, target_names=names
        )

    monkeypatch.setattr(datasets, "fetch_20newsgroups", fetch)
    facts = data._Facts((6, 3), 4, "3 1", empty_rows=(1, 0))
    monkeypatch.setitem(data._FACTS, "news20", facts)
    x, y, n_train, target_names = data.load("news20")
    expected = [[0, 0, 0], [2, 0, 0], [1, 0, 1], [0, 3, 0], [0, 1, 0], [0, 0, 2]]
    np.testing.assert_array_equal(
        x.toarray(), expected
    )  # The vocabulary is that of the train part.
    np.testing.assert_array_equal(y, [0, 0, 0, 1, 0, 1])
    assert (n_train, target_names) == (4, ("first", "second"))


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 half a file"])
def test_a_damaged_file_is_named(cache, content):
    cache.mkdir(parents=True)
    (cache / "mnist_full.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"mnist_full.npz cannot be read"):
        data.load("mnist")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (195, 21)}, r"shape of the features to be \(195, 21\), got \(195, 22\)"),
        ({"n_train": 100}, "training rows to be 100, got 195"),
        ({"counts": "47 148"}, "class counts of the training part to be 47 148, got 48 147"),
        ({"counts": "48 147 0"}, "number of classes to be 3, got 2"),
        ({"mean": 9.0}, "mean training feature to be 9.0, got"),
    ],
)
def test_a_fact_that_does_not_hold_names_the_file_and_both_values(
    cache, monkeypatch, change, message
):
    buffer = io.BytesIO()
    monkeypatch.setattr(datasets, "fetch_openml", lambda *_, **__: parkinsons_of_openml())
    data._SOURCES["parkinsons"].fetch(buffer)
    cache.mkdir(parents=True)
    (cache / "parkinsons.data").write_bytes(buffer.getvalue())
    monkeypatch.setitem(data._FACTS, "parkinsons", data._FACTS["parkinsons"]._replace(**change))
    with pytest.raises(ValueError, match=rf"parkinsons.data: expected .*{message}"):
        data.load("parkinsons")


@pytest.mark.usefixtures("cache")
def test_a_nan_is_refused(monkeypatch):
    bunch = parkinsons_of_openml()
    bunch.data[3, 4] = np.nan
    monkeypatch.setattr(datasets, "fetch_openml", lambda *_, **__: bunch)
    with pytest.raises(ValueError, match="NaN or infinite features to be 0, got 1"):
        data.load("parkinsons")


# Splits and scaling.


def test_a_split_is_disjoint_repeatable_and_depends_on_the_seed():
    parts = data.split(0, 20, (5, 7, 3))
    assert [len(p) for p in parts] == [5, 7, 3]
    assert len(np.unique(np.concatenate(parts))) == 15
    for part, again in zip(parts, data.split(0, 20, (5, 7, 3)), strict=True):
        np.testing.assert_array_equal(part, again)
    assert not np.array_equal(parts[0], data.split(1, 20, (5, 7, 3))[0])


@pytest.mark.parametrize("sizes", [(15, 6), (-1, 3)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="sum to at most n = 20"):
        data.split(0, 20, sizes)


def test_by_date_keeps_the_published_test_part_and_thirds_mixes_it():
    dataset = data.Dataset(np.zeros((11, 2)), np.zeros(11, np.int32), 7, ("zero",))
    train, validation, test = data.by_date(0, dataset)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(7))
    np.testing.assert_array_equal(test, np.arange(7, 11))
    assert (len(train), len(validation)) == (3, 4)
    parts = data.thirds(0, dataset)
    assert [len(p) for p in parts] == [3, 3, 5]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(11))


def test_the_splits_of_news20_have_the_sizes_of_the_paper():
    dataset = real("news20")
    assert [len(p) for p in data.by_date(0, dataset)] == [5657, 5657, 7532]
    assert [len(p) for p in data.thirds(0, dataset)] == [6282, 6282, 6282]


def test_standardising_uses_the_training_part_alone_and_leaves_constant_columns():
    rng = np.random.default_rng(0)
    train, other = 3 + 2 * rng.standard_normal((50, 3)), rng.standard_normal((20, 3))
    train[:, 1] = 0.1
    a, b = data.standardise(train, other)
    np.testing.assert_allclose(a.mean(axis=0), 0, atol=1e-14)
    np.testing.assert_allclose(a.std(axis=0), [1, 0, 1])
    np.testing.assert_allclose(b[:, 1], other[:, 1] - 0.1)
    np.testing.assert_allclose(b[:, 0], (other[:, 0] - train[:, 0].mean()) / train[:, 0].std())


def test_rows_are_normalised_and_empty_rows_stay_empty():
    parts = np.array([3, 4, -2, 0], np.float32), np.array([0, 2, 1, 1]), np.array([0, 2, 2, 3, 4])
    x = sp.csr_array(parts, shape=(4, 3))  # The last row stores a zero.
    y = data.normalise_rows(x)
    np.testing.assert_allclose(y.toarray(), [[0.6, 0, 0.8], [0] * 3, [0, -1, 0], [0] * 3], 1e-6)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(x.toarray()[0], [3, 0, 4])


# Sparse products.


def random_csr(n, p, dtype: type = np.float64):
    """Rows and columns of very different lengths, the longest n and p, and about a third empty."""
    rng = np.random.default_rng(0)
    dense = np.zeros((n, p), dtype)
    for i in range(0, n, 3):
        k = 1 + (i * (p - 1)) // n
        dense[i, rng.choice(p, k, replace=False)] = rng.standard_normal(k)
    dense[:, 1::3] = 0
    dense[n // 2] = rng.standard_normal(p)
    dense[:, p // 2] = rng.standard_normal(n)
    dense[-1], dense[:, -1] = 0, 0
    return sp.csr_matrix(dense), jnp.asarray(dense)


def close(got, expected):
    scale = max(1, *(float(jnp.max(jnp.abs(e))) for e in jax.tree.leaves(expected)))
    tolerance = 1e3 * scale * float(jnp.finfo(jnp.float64).eps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), got, expected
    )


@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (7, 40), (600, 60)], ids=str)
def test_the_products_equal_the_dense_ones(shape):
    csr, dense = random_csr(*shape)
    x = sparse.from_csr(csr)
    w, r = (jax.random.normal(jax.random.key(0), (k, 3)) for k in shape[::-1])
    close(sparse.matmul(x, w), dense @ w)
    close(sparse.rmatmul(x, r), dense.T @ r)


def test_the_products_keep_the_dtype_of_the_matrix():
    csr, dense = random_csr(40, 70, dtype=np.float32)
    w = jax.random.normal(jax.random.key(0), (70, 2), jnp.float32)
    y = sparse.matmul(sparse.from_csr(csr), w)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, dense @ w, atol=1e-5)


def test_a_matrix_without_entries_gives_zero():
    x = sparse.from_csr(sp.csr_matrix((4, 3)))
    close(sparse.matmul(x, jnp.ones((3, 2))), jnp.zeros((4, 2)))
    close(sparse.rmatmul(x, jnp.ones((4, 2))), jnp.zeros((3, 2)))


def test_unsorted_and_duplicate_entries_are_summed_and_the_input_is_left_alone():
    parts = np.array([1.0, 2.0, 4.0]), np.array([2, 0, 2]), np.array([0, 3])
    csr = sp.csr_matrix(parts, shape=(1, 3))
    close(sparse.matmul(sparse.from_csr(csr), jnp.eye(3)), jnp.array([[2.0, 0.0, 5.0]]))
    np.testing.assert_array_equal(csr.indices, [2, 0, 2])


def test_the_transpose_of_each_product_is_the_other_one():
    csr, dense = random_csr(30, 50)
    w, r = (jax.random.normal(jax.random.key(0), (k, 2)) for k in (50, 30))
    # With other columns than its rows, a matrix shows which of the two a product was made from.
    x = sparse.Matrix(sparse.from_csr(csr).rows, sparse.from_csr(2 * csr).columns)

    def transpose(r):
        return jax.linear_transpose(lambda w: sparse.matmul(x, w), w)(r)[0]

    close(transpose(r), 2 * dense.T @ r)
    close(sparse.rmatmul(x, r), 2 * dense.T @ r)
    close(jax.linear_transpose(transpose, r)(w)[0], dense @ w)
    close(jax.grad(lambda w: jnp.vdot(r, sparse.matmul(x, w)))(w), 2 * dense.T @ r)


def derivatives(product, w, r):
    """Every derivative that the experiments take, of a loss with one product in it."""

    def loss(w):
        return jnp.vdot(r, jnp.tanh(product(w)))

    w_dot = jnp.cos(w)
    many = jnp.stack([w, w_dot])
    grad = jax.grad(loss)
    return {
        "grad": grad(w),
        "jvp": jax.jvp(loss, (w,), (w_dot,)),
        "jvp of grad": jax.jvp(grad, (w,), (w_dot,)),
        "grad of grad": jax.grad(lambda w: jnp.vdot(w_dot, grad(w)))(w),
        "grad of jvp": jax.grad(lambda w: jax.jvp(loss, (w,), (w_dot,))[1])(w),
        "linearize": jax.linearize(grad, w)[1](w_dot),
        "vjp of linearized": jax.vjp(jax.linearize(grad, w)[1], w_dot)[1](w)[0],
        "vmap": jax.vmap(product)(many),
        "vmap over columns": jax.vmap(product, in_axes=2, out_axes=2)(jnp.moveaxis(many, 0, 2)),
        "vmap of grad": jax.vmap(grad)(many),
        "grad of vmap": jax.grad(lambda many: jnp.sum(jax.vmap(loss)(many)))(many),
        "vmap of jvp of grad": jax.vmap(lambda u: jax.jvp(grad, (w,), (u,))[1])(many),
        "scan": jax.grad(
            lambda w: jnp.sum(jax.lax.scan(lambda w, _: (w - grad(w), None), w, None, 3)[0])
        )(w),
        "while": jax.lax.fori_loop(0, 3, lambda _, w: w - grad(w), w),
        "checkpoint": jax.grad(jax.checkpoint(loss))(w),
    }


def test_every_derivative_equals_the_dense_one():
    csr, dense = random_csr(12, 16)
    w, r = (jax.random.normal(jax.random.key(0), (k, 2)) for k in (16, 12))

    @jax.jit
    def of_matmul(x, w, r):
        return derivatives(lambda w: sparse.matmul(x, w), w, r)

    @jax.jit
    def of_dense(x, w, r):
        return derivatives(lambda w: x @ w, w, r)

    close(of_matmul(sparse.from_csr(csr), w, r), of_dense(dense, w, r))


def test_derivatives_need_no_jit():
    csr, dense = random_csr(8, 6)
    x, w = sparse.from_csr(csr), jnp.ones((6, 2))
    got = jax.hessian(lambda w: jnp.sum(jnp.sin(sparse.matmul(x, w))))(w)
    close(got, jax.hessian(lambda w: jnp.sum(jnp.sin(dense @ w)))(w))


def test_the_matrix_gets_no_gradient():
    csr, _ = random_csr(8, 6)
    x = sparse.from_csr(csr)
    grads = jax.grad(lambda x: jnp.sum(sparse.matmul(x, jnp.ones((6, 2)))), allow_int=True)(x)
    floats = [g for g in jax.tree.leaves(grads) if g.dtype == jnp.float64]
    assert floats
    assert not any(g.any() for g in floats)


@pytest.mark.parametrize("shape", [(6,), (5, 2), (6, 2, 1)])
def test_a_wrong_shape_says_what_was_expected(shape):
    x = sparse.from_csr(random_csr(8, 6)[0])
    with pytest.raises(ValueError, match=r"`w` must have shape \(6, c\).*got shape"):
        sparse.matmul(x, jnp.ones(shape))
    with pytest.raises(ValueError, match=r"`r` must have shape \(8, c\).*got shape"):
        sparse.rmatmul(x, jnp.ones(shape))


def test_a_wrong_dtype_says_what_was_expected():
    x = sparse.from_csr(random_csr(8, 6)[0])
    with pytest.raises(ValueError, match=r"dtype of the matrix, float64; got .* dtype float32"):
        sparse.matmul(x, jnp.ones((6, 2), jnp.float32))
    with pytest.raises(ValueError, match="real floating-point, got int64"):
        sparse.from_csr(sp.csr_matrix(np.eye(3, dtype=np.int64)))


def test_an_infinite_entry_stays_in_its_rows():
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((30, 50)) < 0.3, rng.standard_normal((30, 50)), 0)
    csr = sp.csr_matrix(dense)
    w = jnp.where(jnp.eye(50, dtype=bool), jnp.inf, 1.0)  # Column j is infinite in row j.
    y = sparse.matmul(sparse.from_csr(csr), w)
    np.testing.assert_array_equal(jnp.isfinite(y), dense == 0)


def test_the_products_of_the_real_texts_equal_those_of_scipy():
    dataset = real("news20")
    assert isinstance(dataset.x, sp.csr_array)
    csr = data.normalise_rows(dataset.x)[data.by_date(0, dataset).train]
    x = sparse.from_csr(csr)
    rng = np.random.default_rng(0)
    r, w = (jnp.asarray(rng.standard_normal((k, 20)), jnp.float32) for k in csr.shape)
    np.testing.assert_allclose(sparse.matmul(x, w), csr @ np.asarray(w), atol=1e-4)
    np.testing.assert_allclose(sparse.rmatmul(x, r), csr.T @ np.asarray(r), atol=1e-3)
