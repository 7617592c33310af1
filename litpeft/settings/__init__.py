"""The dataclasses whose fields are the YAML keys and the command-line options. Nothing here imports torch."""
