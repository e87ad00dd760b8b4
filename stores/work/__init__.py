"""Who works at a store: leases, workers' records, the queue of blocks, deaths.

May import: `blocks`, `format`, `storage`. Start reading in `worklog.py`.
"""
