"""Training as the papers did it."""
