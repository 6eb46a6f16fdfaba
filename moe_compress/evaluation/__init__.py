"""How good a compressed checkpoint is: perplexity, and agreement with the original."""
