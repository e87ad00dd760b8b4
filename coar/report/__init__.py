"""Figures and the HTML report.

May import: everything in `coar` below it, not `planning`, `demo` or `cli`. Start reading in `plots.py`. A new figure
is a function there, and a section of a report in `html.py` or `../demo.py`.
"""
