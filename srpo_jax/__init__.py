"""Direct-Align and SRPO for FLUX in JAX."""
