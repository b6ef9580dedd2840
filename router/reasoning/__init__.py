"""Reasoning in what a model says, apart from its answer. The table of names is in `parsers.py`."""
