"""What several results say together: tables in the terminal and on disk."""
