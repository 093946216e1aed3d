"""Image classification: training, evaluation, data preparation, models."""
