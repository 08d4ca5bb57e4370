"""Audio collections on disk: packing, reading, decoding, augmentation and the catalog of tasks."""
