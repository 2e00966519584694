"""Files of a model: from a hub id, a folder or a GGUF to checked configuration, weights and tokenizer."""
