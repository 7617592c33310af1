"""Data sets of the Hugging Face hub as sources of rows: their addresses, their splits, their files in the cache."""
