"""What must exist before anything is installed? The standard library and Python 3.7's syntax; for `start.py`."""
