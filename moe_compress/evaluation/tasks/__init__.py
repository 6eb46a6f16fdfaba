"""Tasks: what a model is asked, how its answers are scored, and how sure the score is."""
