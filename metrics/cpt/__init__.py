"""CPT: an `evaluate` module, `evaluate.load("metrics/cpt")`."""
