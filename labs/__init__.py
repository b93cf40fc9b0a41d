"""Experiments on the model: one file a question, each runnable by itself with python -m labs.NAME."""
