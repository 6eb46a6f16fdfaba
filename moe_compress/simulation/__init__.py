"""Dry runs: the stages of a job drive a cluster that is not there, on a clock that nobody waits for.

Scheduling, budgets and decisions are the real ones; workers and units are replaced by what they cost, and what they
would leave on disk by files of the same names with next to nothing in them (units.py).
"""
