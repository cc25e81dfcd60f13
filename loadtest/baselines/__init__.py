"""Servers of the kind that users run today, around the stock pipeline: what Tandem is compared with."""
