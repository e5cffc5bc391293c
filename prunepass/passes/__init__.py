"""One pass a file: a small frozen dataclass with ``run``, graph in, graph out, that says how many places it changed."""
