"""The worker of a site: joins a run, trains on local data, posts updates. See ARCHITECTURE.md."""
