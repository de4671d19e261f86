"""Mixing of old and new rows, and the packaged models and data."""
