"""The parts of gpu_suite.py: what runs, how it is run, and what is told about it."""
