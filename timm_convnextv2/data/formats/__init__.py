"""Image formats: one file per family, and one table that says which reader takes which file."""
