"""Text to token batches, and the statistics that calibration gathers from them."""
