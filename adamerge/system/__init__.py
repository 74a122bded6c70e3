"""The ground: files, memory, processes and progress."""
