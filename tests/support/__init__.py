"""What several tests share: references, problems, processes, and programs that tests start."""
