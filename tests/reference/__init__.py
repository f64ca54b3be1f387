"""Independent float64 oracles: written from the papers, sharing no code with the library."""
