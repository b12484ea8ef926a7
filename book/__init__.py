"""The house of the book: its notebook reader, Sphinx extension, theme and build."""
