"""Where in a model a defense acts: layers, parts, directions, causes. Token ids in, plain tables out."""
