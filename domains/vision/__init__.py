"""Images: classification and generation."""
