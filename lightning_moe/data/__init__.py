"""Text in, packed token windows out, the same on every rank and after every restart."""
