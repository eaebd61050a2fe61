"""The pictures of the gallery, each the first figure of a recipe: `python docs/pictures.py`."""

import base64
import pathlib

import nbclient
import nbformat

RECIPES = pathlib.Path(__file__).parent / "recipes"


def first_picture(notebook: pathlib.Path) -> bytes | None:
    """The first figure that the notebook draws, as PNG; `None` where it draws none."""
    cells = nbclient.execute(nbformat.read(notebook, 4), timeout=300).cells
    for cell in cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                return base64.b64decode(output["data"]["image/png"])
    return None


def main() -> None:
    """Writes `recipes/pictures/NAME.png`."""
    (RECIPES / "pictures").mkdir(exist_ok=True)
    for notebook in sorted(RECIPES.glob("*.ipynb")):
        picture = first_picture(notebook)
        if picture is not None:
            (RECIPES / "pictures" / f"{notebook.stem}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
