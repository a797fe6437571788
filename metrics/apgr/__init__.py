"""APGR: an `evaluate` module, `evaluate.load("metrics/apgr")`."""
