"""Hold the bundled geography question set and the script that renders it."""
