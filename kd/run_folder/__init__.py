"""The files of a run: configuration, log, predictions and results. Each module has both writer and reader."""
