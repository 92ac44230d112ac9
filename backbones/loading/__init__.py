"""Files of models: where they are, whether they can be trusted, what they hold, and how it is loaded."""
