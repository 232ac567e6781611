"""How to look at a sweep: tables, the terminal, pages."""
