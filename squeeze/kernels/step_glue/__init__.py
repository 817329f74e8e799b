"""What stands between the products and the attention of a decode step."""
