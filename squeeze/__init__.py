"""Post-training compression for Hugging Face language models."""
