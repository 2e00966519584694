"""Checkpoints: the files of a model, from a name on the hub, a folder or a GGUF to checked configuration and weights."""
