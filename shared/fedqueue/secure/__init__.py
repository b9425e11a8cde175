"""Secure aggregation: what clients, keepers and the coordinator compute so that only sums of updates are seen."""
