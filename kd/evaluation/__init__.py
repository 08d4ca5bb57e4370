"""Predictions, and metrics computed from them."""
