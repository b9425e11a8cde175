"""Redis users (`acl.py`), TLS certificates (`certificates.py`) and the keys that sign messages (`enrolment.py`)."""
