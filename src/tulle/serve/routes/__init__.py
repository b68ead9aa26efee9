"""One file per route, or per few that belong together. What all of them need is here."""
