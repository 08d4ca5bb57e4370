"""Targets."""

TARGETS: dict = {}
