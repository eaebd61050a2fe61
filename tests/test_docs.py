"""The site: it builds without a warning, every notebook runs, every public name has its place."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

import fixedgrad as fg

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
RECIPES = sorted((DOCS / "recipes").glob("*.ipynb"))
NOTEBOOKS = [DOCS / "getting_started.ipynb", *RECIPES]
EACH = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def test_every_public_name_has_one_place_in_the_reference():
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    found = re.findall(r"^\.\. auto\w+:: (\w+)$", pages, re.MULTILINE)
    assert sorted(found) == sorted(name for name in fg.__all__ if name != "bounds")
    assert "automodule:: fixedgrad.bounds" in pages


@EACH
def test_a_notebook_is_committed_without_results_and_opens_in_colab(notebook):
    first, install, *others = cells(notebook)
    path = notebook.relative_to(ROOT).as_posix()
    assert f"colab.research.google.com/github/fixedgrad/fixedgrad/blob/main/{path})" in "".join(
        first["source"]
    )
    assert 'find_spec("fixedgrad")' in "".join(install["source"])
    code = [cell for cell in (install, *others) if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert any("assert " in "".join(cell["source"]) for cell in code)


def test_every_recipe_is_in_the_gallery():
    gallery = (DOCS / "recipes" / "index.md").read_text(encoding="utf-8")
    toctree = gallery[gallery.index("```{toctree}") :]
    assert sorted(re.findall(r"^(\w+)$", toctree, re.MULTILINE)) == [path.stem for path in RECIPES]
    for recipe in RECIPES:
        assert f":link: {recipe.stem}\n" in gallery


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_all_notebooks_hold(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "-j",
        "2",
        "--keep-going",
        str(DOCS),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    for notebook in NOTEBOOKS:
        page = tmp_path / notebook.relative_to(DOCS).with_suffix(".html")
        assert page.exists()
