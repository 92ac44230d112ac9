"""Speech: recognition, translation and language identification by CTC."""
