"""Streaming sums over calibration tokens, per layer and expert, and their store."""
