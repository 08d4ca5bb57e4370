"""Audio processing: decoding, augmentation, mixing and synthesis."""
