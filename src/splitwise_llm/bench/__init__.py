"""What `splitwise bench` and `splitwise demo` run; it may know everything but the command line."""
