"""Slow and obvious twins of the fast paths, for tests and for reading."""
