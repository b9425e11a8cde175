"""Builders shared by the tests: models, runs, servers, tasks and processes."""
