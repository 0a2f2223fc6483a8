"""Watching a model without touching what it computes: hooks, watched methods, attention of a layer, encodings."""
