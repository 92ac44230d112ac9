"""DNA: language models of genomes, and classes, labels or numbers of sequences."""
