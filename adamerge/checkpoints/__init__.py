"""A file, a folder or a name on the Hub, read as named tensors."""
