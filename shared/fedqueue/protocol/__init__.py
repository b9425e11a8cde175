"""What crosses Redis: messages, keys, stream entries, signatures."""
