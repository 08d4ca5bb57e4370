"""What users read of a command before it runs: its help."""
