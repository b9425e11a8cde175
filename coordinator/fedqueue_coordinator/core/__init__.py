"""The federation as a pure state machine, and every decision it makes: no Redis, no thread, no clock, no file."""
