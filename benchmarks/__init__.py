"""Programs that measure. Tests assert nothing about them."""
