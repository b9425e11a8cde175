"""The federation as a pure state machine, and everything that decides: no Redis, no thread, no clock, no file."""
