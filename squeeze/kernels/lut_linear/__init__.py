"""K6: a linear layer whose weight is packed codebook indices."""
