"""Training: settings, losses, parameter groups and the loop."""
