"""Logits on disk: rows, shards, several stores as one."""
