"""The asset checks of an array: rules, which block what follows, and quality, which never blocks."""
