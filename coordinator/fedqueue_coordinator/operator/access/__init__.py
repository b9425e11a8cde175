"""Who may do what in Redis, and whose signatures are valid."""
