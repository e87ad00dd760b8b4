"""Who works at a store: leases, workers' records, the queue of blocks, deaths.

May import: `blocks`, `format`, `storage` and the root's basics. Start reading in `worklog.py`.
"""
