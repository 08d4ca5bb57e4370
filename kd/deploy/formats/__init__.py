"""Further forms of an export, each run in its own runtime and compared: ``kd export --format``."""
