"""Photographs with class masks: their folders, and the clips and expressions that training makes of them."""
