"""The benchmark beside jaxopt and optimistix, one module for each part."""
