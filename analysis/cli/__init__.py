"""The command line: options, commands and terminal tables; nothing here computes."""
