"""K7: encode whole blocks of keys or values in one launch, straight into the cache's slots."""
