"""What experiments share: reports, checkpoints, errors of hypergradients."""
