"""What a run leaves on disk: its configuration, its log, its predictions and its results, writers and readers."""
