"""The experiments of the library: `python -m experiments` lists them."""
