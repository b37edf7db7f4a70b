"""Weights with fewer bits: the graph and the weight recipes change together, before any weight is read."""
