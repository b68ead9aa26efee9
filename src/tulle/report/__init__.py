"""Reports: tables for the terminal, self-contained HTML pages."""
