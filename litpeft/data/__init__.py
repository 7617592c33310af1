"""Files of rows become tokens with a mask of what is trained. Only batches.py imports torch."""
