"""Paths that a user names: what may be read, and what may be written over."""
