"""Names, files and objects to checked arrays."""
