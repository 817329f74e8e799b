"""Sparse attention: policies that emit an index, which is data."""
