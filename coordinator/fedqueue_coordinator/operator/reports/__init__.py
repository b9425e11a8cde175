"""Tables and pictures of runs, comparisons and audits."""
