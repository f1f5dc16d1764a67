"""Graph passes, one per file, each named by what it does to the graph."""
