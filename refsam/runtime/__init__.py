"""The process refsam runs in: device and precision, memory, threads, signals, its shard of the work."""
