"""Settings: YAML experiments and the frozen models that validate them."""
