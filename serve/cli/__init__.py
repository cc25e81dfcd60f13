"""The command `tandem`, and what its commands are made of."""
