"""One file for each corpus: how its folder is read."""
