"""Aggregation algorithms: they turn updates into one step of the model."""
