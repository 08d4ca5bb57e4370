"""Offline stage: teachers, and the HDF5 stores that keep their logits."""
