"""Table 1 of the paper: objective and test accuracy in %, by data set, t and method."""

PAPER: dict[tuple[str, int], dict[str, tuple[float, float]]] = {
    ("parkinson", 100): {
        "itd": (2.39, 75.8),
        "fp_t": (2.37, 81.8),
        "cg_t": (2.37, 78.8),
        "fp_k": (2.71, 80.3),
        "cg_k": (2.33, 77.3),
    },
    ("parkinson", 150): {
        "itd": (2.11, 69.7),
        "fp_t": (2.20, 77.3),
        "cg_t": (2.20, 77.3),
        "fp_k": (2.60, 78.8),
        "cg_k": (2.02, 77.3),
    },
    ("fashion", 5): {"itd": (0.41, 84.1), "fp_t": (0.41, 84.1), "cg_t": (0.42, 83.9)},
    ("fashion", 10): {
        "itd": (0.43, 83.8),
        "fp_t": (0.43, 83.8),
        "cg_t": (0.42, 84.0),
        "fp_k": (0.42, 83.9),
        "cg_k": (0.42, 84.0),
    },
    ("news20", 10): {"itd": (1.08, 61.3), "fp_t": (1.03, 62.1), "cg_t": (0.93, 63.7)},
    ("news20", 25): {
        "itd": (0.97, 62.8),
        "fp_t": (1.02, 62.3),
        "cg_t": (0.78, 63.3),
        "fp_k": (0.94, 63.6),
        "cg_k": (0.82, 64.3),
    },
    ("news20", 50): {
        "itd": (0.89, 64.2),
        "fp_t": (0.84, 64.4),
        "cg_t": (0.64, 63.1),
        "fp_k": (0.97, 63.0),
        "cg_k": (0.75, 64.2),
    },
}
"""A k of its own that equals t is not repeated, as in the paper."""
