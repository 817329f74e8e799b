"""Our tasks as lm-eval task files, with the functions that make their documents offline."""
