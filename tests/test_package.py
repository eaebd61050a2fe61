"""What is published: the wheel and the source distribution, and the README run from the wheel alone."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]


class Built(NamedTuple):
    wheel: Path
    source: Path


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command, with none of the settings that these tests have for Python and JAX."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PYTHON", "XLA_"))}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def succeed(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """The Python of a new environment; a skip where there is no package registry to fill it from."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "download", "--no-deps", "--retries", "0", "hatchling")
    done = run(*pip, cwd=folder)
    if done.returncode:
        pytest.skip(f"no package registry: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def built(fresh, tmp_path_factory) -> Built:
    del fresh  # What builds is made in an environment from the registry as well.
    out = tmp_path_factory.mktemp("dist")
    succeed(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    return Built(out / f"fixedgrad-{VERSION}-py3-none-any.whl", out / f"fixedgrad-{VERSION}.tar.gz")


@pytest.mark.slow
def test_the_package_index_would_take_both_distributions(built):
    succeed(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=ROOT)


@pytest.mark.slow
def test_the_wheel_holds_the_library_with_its_types_and_nothing_else(built):
    names = set(zipfile.ZipFile(built.wheel).namelist())
    metadata = {name for name in names if name.startswith(f"fixedgrad-{VERSION}.dist-info/")}
    library = {
        path.relative_to(ROOT / "src").as_posix()
        for suffix in ("*.py", "py.typed")
        for path in (ROOT / "src").rglob(suffix)
    }
    assert "fixedgrad/py.typed" in library
    assert names - metadata == library


@pytest.mark.slow
def test_the_package_index_shows_a_readme_whose_links_lead_somewhere(built):
    wheel = zipfile.ZipFile(built.wheel)
    text = wheel.read(f"fixedgrad-{VERSION}.dist-info/METADATA").decode()
    links = re.findall(r"\]\((.+?)\)", text)
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


@pytest.mark.slow
def test_the_source_distribution_holds_what_the_tests_need_and_no_figures(built):
    with tarfile.open(built.source) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    wanted = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "conftest.py"} | {
        path.relative_to(ROOT).as_posix()
        for folder in ("src", "tests", "experiments")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".json"}
    }
    assert wanted - names == set()
    assert [name for name in names if name.endswith(".png")] == []


@pytest.mark.slow
def test_the_readme_runs_from_the_wheel_alone(fresh, built, tmp_path):
    succeed(fresh, "-m", "pip", "install", "--quiet", built.wheel, cwd=tmp_path)
    where = succeed(
        fresh, "-c", "import fixedgrad as fg; print(fg.__version__, fg.__file__)", cwd=tmp_path
    )
    assert where.startswith(f"{VERSION} {fresh.parents[1]}")
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    succeed(fresh, "-m", "doctest", "-o", "NORMALIZE_WHITESPACE", "README.md", cwd=tmp_path)


def test_version_and_addresses_are_those_of_pyproject():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {VERSION}\n" in citation
    urls = PROJECT["urls"]
    assert f"\nurl: {urls['Documentation']}\n" in citation
    assert f"\nrepository-code: {urls['Source']}\n" in citation
    homes = (urls["Source"], urls["Documentation"])
    for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.md"), *ROOT.glob(".github/**/*.yml")):
        found = re.findall(
            r"https://[\w.]*github[^\s\"')]*fixedgrad", path.read_text(encoding="utf-8")
        )
        assert [address for address in found if not address.startswith(homes)] == [], path.name
