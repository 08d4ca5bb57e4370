"""Teachers, which turn waveforms into logits."""
