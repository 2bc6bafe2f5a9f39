"""What is DualSpeed worth? Measurements for the documents; no part of the library."""
