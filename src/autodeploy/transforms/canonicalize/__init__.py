"""Bring a captured graph to level CANONICAL."""
