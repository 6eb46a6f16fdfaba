"""Recovery: a compressed checkpoint is trained to answer as the original does."""
