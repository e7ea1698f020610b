"""What keeps a long run on many GPUs alive? Nothing here is about the method."""
