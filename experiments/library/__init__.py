"""What the library claims of itself beside the paper."""
