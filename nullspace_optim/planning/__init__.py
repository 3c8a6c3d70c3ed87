"""Memory and FLOPs of a protected run, predicted from shapes alone."""
