"""Lightning data and task modules, one folder a domain."""
