"""One module per command; each adds its parser and runs with the parsed options."""
