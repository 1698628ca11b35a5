"""Floor 4: the command line, one verb a file."""
