"""Experiments on the model: one file a question, run by python -m labs.NAME."""
