"""A folder for PYTHONPATH: a Python process started with it cannot unpickle anything."""
