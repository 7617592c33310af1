"""What other programs have learned, read as runs: a file for each."""
