"""Several workers on one store: processes, Ray actors, Slurm jobs, and who watches them.

May import: `work` and the root's basics. Start reading in `supervise.py`.
"""
