"""Tandem without Ray: everything that makes an image from a prompt, importable and testable in seconds."""

import logging

__version__ = "0.1.0"

# diffusers imports bitsandbytes where it is installed, which warns in every process of a kernel that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
