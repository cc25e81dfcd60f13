"""What sends the load: processes of their own, because Locust patches what it runs in."""
