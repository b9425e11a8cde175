"""`fedqueue audit`: checks a run's ledger, jobs, model and signatures against the invariants of PROTOCOL.md.

Reading order:

1. `audit_input.py` reads one consistent snapshot of a run, from Redis or from a folder of results.
2. `audit.py` holds the checks I1 to I4, S5, S7, S8 and S. It is pure: an `AuditInput` in, a list of `Check` out.
3. `replay.py` repeats every merge from version 0 and compares the bits (part of I3).
4. `masked_versions.py` checks the cohorts of a run with keepers, what the keepers signed, and the budgets (S5, S7, S8).
5. `signatures.py` verifies what the coordinator signed (S). `fedqueue export` uses it too.
"""
