"""What is where in a store: the root's metadata, groups, columns, chunks and shards.

May import: `storage`. Start reading in `groups.py`; a new field goes there and into `layout.py`.
"""
