"""From a trained student to a device: taggers, export, parity."""
