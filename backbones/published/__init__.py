"""Published language models: their settings and the names of their tensors, in terms of our backbones."""
