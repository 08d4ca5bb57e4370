"""Training, evaluation and the command line of the knowledge-distillation pipeline."""
