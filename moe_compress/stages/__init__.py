"""The stages of a job, one file each; pipeline.py is their order."""
