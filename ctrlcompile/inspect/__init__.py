"""What the compiled model does, as tables for people."""
