"""`python -m jobs.compress RECIPE [--set key=value]`: what a cluster is given to run, `moe-compress compress`."""

from .cli import main

if __name__ == "__main__":
    main("compress")
