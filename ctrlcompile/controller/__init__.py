"""The feedback loop that prices blocks and switches them, so that a run lands on its budget."""
