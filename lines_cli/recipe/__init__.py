"""What is asked: YAML and plain values, read, checked and frozen."""
