"""Photographs with class masks: folders of them, and the clips and expressions that training makes of them."""
