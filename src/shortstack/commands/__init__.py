"""What the command line calls, a module a command: values and paths in, plain data out."""
