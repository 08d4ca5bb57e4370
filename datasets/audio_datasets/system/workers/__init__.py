"""Data-loading workers: starting them, taking over their batches, and saying in plain words why one has ended."""
