"""Linear layer of a palette of E4M3 entries over inputs rounded to E4M3."""
