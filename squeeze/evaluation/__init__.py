"""Quality, speed and memory of a model, dense or squeezed."""
