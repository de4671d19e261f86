"""Scorers of texts: what can still become valid, what is valid, what passes its tests."""
