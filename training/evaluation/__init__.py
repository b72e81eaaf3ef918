"""Who is asked in an evaluation, and what becomes of the answers."""
