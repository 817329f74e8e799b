"""Weight clustering and low-bit weights. One file is one method."""
