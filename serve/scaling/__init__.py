"""How many replicas each placement wants: arithmetic for Serve's policy and `tandem simulate`. No Ray, no torch."""
