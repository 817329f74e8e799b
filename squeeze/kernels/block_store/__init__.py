"""Storage of encoded blocks at slots that the device counts."""
