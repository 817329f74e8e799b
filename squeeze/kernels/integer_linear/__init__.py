"""K6 for integers: a linear layer whose weight is packed codes with a scale per group."""
