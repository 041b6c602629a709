"""Turn results into tables, plots, comparisons and the GPU report."""
