"""Fusions: fewer, larger ops; each rewrites the graph and the weight recipes together."""
