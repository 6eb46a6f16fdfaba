"""The only room that knows the internals of transformers."""
