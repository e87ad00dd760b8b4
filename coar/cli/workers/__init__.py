"""`--workers`, `--ray`, `--slurm`, and what they start.

May import: `cli` beside it, and everything below. Start reading in `command.py`.
"""
