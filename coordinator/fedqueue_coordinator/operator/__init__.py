"""What the operator of a federation starts: one module per command of `fedqueue`.

`local_run` (run), `compare` (compare), `runs` (status, list), `export` (export), `audit/` (audit), `access/` (acl,
certs, enroll, revoke), `scaffold` (init). The remaining modules support these: `embedded_server`, `local_workers` and
`child_processes` start processes, `progress_view` shows a run in progress, `results` and `reports/` write its results.
"""
