"""The command: runs the loop, and tells how it ended."""
