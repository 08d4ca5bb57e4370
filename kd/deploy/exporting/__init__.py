"""``kd export``: what is exported, how it is compared with PyTorch, and the folder it ends up in."""
