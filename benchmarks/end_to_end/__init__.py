"""Measure whole commands: segmenting, training, scoring, the page."""
