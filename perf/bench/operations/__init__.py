"""The operations that are measured, beside their peers."""
