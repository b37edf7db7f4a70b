"""Bring a canonical graph to level CACHED."""
