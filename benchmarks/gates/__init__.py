"""Compile every GPU kernel without a GPU."""
