"""Models and runs in the files of other programs: a file for each."""
