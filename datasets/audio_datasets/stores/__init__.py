"""Clips on disk: the clip store, several as one, and what lies beside it."""
