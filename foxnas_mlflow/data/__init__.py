"""Layer 0: images on their way into a network, the same in training, evaluation and serving."""
