"""Reports of an evaluation: one HTML page, Markdown, pictures, curves."""
