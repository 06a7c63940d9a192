"""Checkpoints as their users have them: headers, folders, and what stands beside the weights."""
