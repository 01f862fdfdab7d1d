"""Blocks in Redis: one server, a Redis Cluster, or a master that sentinels monitor."""
