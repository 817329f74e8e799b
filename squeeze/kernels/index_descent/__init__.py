"""Descent over codebook indices, one weight of every row at a time."""
