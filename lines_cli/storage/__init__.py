"""Bytes on a disk: reading, writing, digests, staging, and whose a file is."""
