"""Where image files are: folders, archives, lists and index files."""
