"""Bytes on a disk, or in an object store: reading, writing, digests, staging, and whose a file is."""
