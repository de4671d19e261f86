"""Decoding that spends compute on search, with external scorers and exact accounts."""
