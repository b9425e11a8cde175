"""The protocol: messages, keys, stream entries, signed envelopes, and the identities that sign them."""
