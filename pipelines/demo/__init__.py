"""``vertebra demo``: every pipeline on its sample data with the bundled models, in one report; a file a domain."""
