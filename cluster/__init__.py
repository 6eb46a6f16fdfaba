"""The Ray executor of the stages of moe_compress."""
