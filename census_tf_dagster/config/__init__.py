"""What a deployment declares: sets, placement, publication, retention, spending and variables.

Each value is checked here, where it enters, and passed on as plain values. Code that opens the Census, the checkpoint
or the store does not belong here.
"""
