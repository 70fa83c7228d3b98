"""The command line: `main` parses, and each command is one file that is imported only when it is called."""
