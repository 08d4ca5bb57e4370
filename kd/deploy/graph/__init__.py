"""What goes into an exported model file: front end, student, operators, stored weights."""
