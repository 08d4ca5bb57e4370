"""Logits on disk: rows, shards, ensembles and joined stores."""
