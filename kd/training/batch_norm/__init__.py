"""Batch-norm statistics: exchanged between processes while training, and taken anew for inference."""
