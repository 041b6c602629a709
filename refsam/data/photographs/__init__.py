"""Photographs with class masks: folders of them, and the clips and sentences that training makes of them."""
