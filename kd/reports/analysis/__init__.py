"""What the predictions of a run say about its classes, clips and devices."""
