"""Training, evaluation, checkpoints and logs; knows no model and no dataset."""
