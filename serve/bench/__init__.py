"""Measurements of the text-encoder pool on the machine at hand, with random weights at real shapes."""
