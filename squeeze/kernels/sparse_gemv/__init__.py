"""Linear layer that reads only the columns whose input is large enough."""
