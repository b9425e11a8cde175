"""Measures what updates and models tell about the rows that they were trained on: attacks, statistics, report."""
