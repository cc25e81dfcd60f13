"""The frozen messages that cross rooms. No room shares a mutable object with another."""
