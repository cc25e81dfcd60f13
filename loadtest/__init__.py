"""Load on a server as its users make it, the servers that they run today, and what both come to."""
