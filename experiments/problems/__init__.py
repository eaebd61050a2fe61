"""The bilevel problems and their data."""
