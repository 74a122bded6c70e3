"""Lightning callbacks: export of the merged weights, graceful stops."""
