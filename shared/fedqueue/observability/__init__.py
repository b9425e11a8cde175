"""Metrics of a process in the format of Prometheus: what there is, how it is counted, and where it is served."""
