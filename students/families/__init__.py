"""One file for each family of students."""
