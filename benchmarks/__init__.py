"""Ratios of our cost to a floor, timed side by side."""
