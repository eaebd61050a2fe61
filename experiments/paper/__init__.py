"""The experiments of the paper, and what it published."""
