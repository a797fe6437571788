"""The flows: they compose tasks and decide nothing else. Read pipeline.py first."""
