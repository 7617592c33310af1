"""From files of rows to tokens with a mask of what is trained. Only batches.py imports torch."""
