"""What first_run.py runs in its processes, and how it reports."""
