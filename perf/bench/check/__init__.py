"""What gpu_check.py checks, and first_run.py's smoke test with it."""
