"""Importance criteria: pure functions from statistics to scores, in one registry."""
