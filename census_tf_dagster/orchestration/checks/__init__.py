"""Asset checks: the rules that block an array, and its quality, which blocks nothing."""
