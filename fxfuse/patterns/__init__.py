"""One file per pattern; each defines ``pattern``. Discovered by name: adding a file is all it takes."""
