"""Models behind an API: their addresses, what their servers tell of the next token, and their engine."""
