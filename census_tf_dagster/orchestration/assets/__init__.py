"""The four assets of a set. Thin: each opens the job, calls its step, and shows the summary."""
