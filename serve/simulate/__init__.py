"""A fleet and its traffic, computed: the server's own claim order, wants, costs and step scheduler on a simulated
clock. No torch, no Ray, no Redis."""
