"""Data: clips that refsam draws itself."""
