"""What an update takes: counted from sizes, read from compiled programs, or timed."""
