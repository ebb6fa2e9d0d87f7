"""Accuracy matrices and their summaries, task inference, the predictor of a saved model."""
