"""Named end-to-end runs: connect data, stages, constraints and gate."""
