"""Judges from outside: public benchmarks, with their problems and their methods."""
