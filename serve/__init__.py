"""Tandem without Ray: everything that makes an image from a prompt, importable and testable in seconds."""

__version__ = "0.1.0"
