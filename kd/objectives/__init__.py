"""Objectives, which compute losses from a student and a batch."""
