"""`python -m jobs.distill RECIPE [--set key=value]`: what a cluster is given to run, `moe-compress distill`."""

from .cli import main

if __name__ == "__main__":
    main("distill")
