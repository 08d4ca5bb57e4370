"""Teachers: what turns a waveform into logits."""
