"""Implementations of ops, by provider. `provider.py` says which there are; each folder is one provider. `beside.py` has
those that the runtime calls itself.
"""
