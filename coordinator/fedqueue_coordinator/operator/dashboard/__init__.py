"""The page on runs: what it shows of a ledger, where that comes from, and the server."""
