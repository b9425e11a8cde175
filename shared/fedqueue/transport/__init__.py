"""Access to Redis and RQ: connections, blobs, Lua scripts, jobs."""
