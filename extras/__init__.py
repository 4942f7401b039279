"""What a reader of the method can skip."""
