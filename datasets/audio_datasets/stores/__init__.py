"""Clips on disk: the clip store, joined stores, and the files beside them."""
