"""The Census side: which cells a release holds, how they are split, and their counts as CSR."""
