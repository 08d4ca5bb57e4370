"""What a task is, and the tasks by name."""
