"""Access to Redis and RQ: connections, blobs, scripts, jobs."""
