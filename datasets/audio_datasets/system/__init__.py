"""Files, locks, signals, messages: what every command needs of the machine."""
