"""Speculative decoding: propose, verify, accept, commit, crop; and the scheduler."""
