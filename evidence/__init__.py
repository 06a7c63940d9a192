"""What LiNeS does to models that are really trained: `make reproduce` trains, edits, merges, measures, and writes
docs/evidence.md from nothing but that.
"""
