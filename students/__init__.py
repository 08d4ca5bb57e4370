"""Small students for audio tagging: architectures by name, their log-mel front end, their weights and their cost."""

from students.card import load_student, save_student
from students.catalog import create_student, list_students
from students.weights import load_weights

__all__ = ["create_student", "list_students", "load_student", "load_weights", "save_student"]
