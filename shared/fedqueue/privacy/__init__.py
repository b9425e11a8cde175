"""Differential privacy: accounting, spending, and noise that nobody can predict."""
