"""Pure tensor functions on the matrices of experts; nothing here knows what a model is."""
