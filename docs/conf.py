"""The site: `pip install -e '.[docs]' && python -m sphinx -W docs out/site`."""

import importlib.metadata
import re
from typing import Any

import fixedgrad

project = "fixedgrad"
author = copyright = "The fixedgrad authors"
release = importlib.metadata.version("fixedgrad")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
    "myst_nb",
]
exclude_patterns = ["**.ipynb_checkpoints"]

html_theme = "sphinx_book_theme"
html_title = "fixedgrad"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "repository_url": "https://github.com/fixedgrad/fixedgrad",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "show_toc_level": 2,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
}

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 80
copybutton_prompt_text = ">>> |\\.\\.\\. "
copybutton_prompt_is_regexp = True

_SECTION = re.compile(r"(Args|Returns|Raises|Attributes|References):")
_CODE = re.compile(r"`([^`]+)`")
_MARKUP = re.compile(r"(?<![`\w*])\*(?=\w)|(?<=\w)_(?=[\s,.;:)])|(?<![`|])\|(?!`)")
"""What reST would take for emphasis, a reference or a substitution."""


def as_rest(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings read well with `help`: indented equations, names in backticks. Here as reST."""
    del app, what, name, options
    known = {x for x in fixedgrad.__all__ if getattr(fixedgrad, x) is not obj}

    def linked(match: re.Match[str]) -> str:
        inside = match[1]
        return f":py:obj:`~fixedgrad.{inside}`" if inside in known else f"``{inside}``"

    out: list[str] = []
    in_body, previous, doctest = True, "", False
    for line in lines:
        in_body = in_body and not _SECTION.fullmatch(line)
        doctest = line.lstrip().startswith(">>>") or (doctest and bool(line.strip()))
        indented = line.startswith("    ") and in_body
        if indented and not previous.strip():
            out += [".. code-block:: text", ""]
        previous = line
        if doctest or indented:
            out.append(line)
        else:
            escaped = _CODE.sub(linked, line.replace("\\", "\\\\"))
            out.append(_MARKUP.sub(r"\\\g<0>", escaped))
    lines[:] = out


def setup(app: Any) -> None:
    """Before napoleon, which makes reST of the sections."""
    app.connect("autodoc-process-docstring", as_rest, priority=400)
