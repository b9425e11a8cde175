"""A keeper: lets the coordinator see sums of updates, and no update. See ARCHITECTURE.md."""
