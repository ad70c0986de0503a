"""What the values of a mask mean."""

IGNORE_INDEX = 255
"""The mask value of pixels without a truth: no loss, no metric."""
