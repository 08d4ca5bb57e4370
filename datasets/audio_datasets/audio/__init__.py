"""Audio as numbers: files decoded, augmented, mixed and made."""
