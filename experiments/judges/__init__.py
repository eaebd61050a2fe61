"""Experiments that hold the library to published settings of others."""
