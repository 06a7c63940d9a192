"""Plan -> bytes: passes that measure, the pass that writes, threads, buffers, devices."""
