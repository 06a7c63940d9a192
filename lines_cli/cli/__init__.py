"""The command line: one file a command, its options, what it prints, and how it ends."""
