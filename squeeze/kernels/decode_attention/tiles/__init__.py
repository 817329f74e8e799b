"""Format maths of the Triton kernel, one file per KV format, found by the format's name."""
