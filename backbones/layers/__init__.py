"""Parts that two or more backbone families use."""
