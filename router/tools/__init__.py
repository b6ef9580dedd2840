"""Tool calls in what a model says: one parser a format. The table of names is in `parsers.py`."""
