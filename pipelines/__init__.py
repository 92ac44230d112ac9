"""Files in, files out: one file a domain, on one base."""
