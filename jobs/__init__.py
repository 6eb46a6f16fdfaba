"""What a person runs: the moe-compress command and its siblings."""
