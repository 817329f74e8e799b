"""K2: attention of a few queries over a packed KV cache and its full-precision remainder."""
