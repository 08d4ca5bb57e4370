"""Audio as it arrives: sources of samples, windows that follow each other, and the events that their scores make."""
