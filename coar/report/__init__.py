"""Figures and the HTML report.

May import: everything in `coar` but `cli`. Start reading in `plots.py`.
"""
