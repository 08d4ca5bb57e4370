"""What turns a student and a batch into losses."""
