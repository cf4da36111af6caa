"""What a training step needs on sharded parameters: norms, optimizers, what is to stay equal over the ranks."""
