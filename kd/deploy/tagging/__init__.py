"""Tags of files and waveforms: which model tags, the windows it is given, and how its tags are written."""
