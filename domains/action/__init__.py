"""Actions of robots: demonstrations to short tokens, and policies that act."""
