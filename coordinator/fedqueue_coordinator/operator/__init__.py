"""The operator's tools: local runs, status, export, reports."""
