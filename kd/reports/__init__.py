"""Reports of runs: reading run folders, analysing predictions, and writing pages and Markdown."""
