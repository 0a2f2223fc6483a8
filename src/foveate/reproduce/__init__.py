"""Published tables run again, on the reader's own weights, and held against the papers' numbers. The tables are data, in `tables`."""
