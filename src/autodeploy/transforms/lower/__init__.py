"""Bring a cached graph to level LOWERED."""
