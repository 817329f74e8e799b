"""KV-cache formats: how one layer's keys or values are stored. One file is one format."""
