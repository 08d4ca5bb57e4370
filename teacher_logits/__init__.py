"""The offline stage: teachers, and HDF5 stores for their logits."""
