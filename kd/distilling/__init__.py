"""``kd distill``: from a folder of sounds, some of them labelled, to a small student, through the ordinary commands."""
