"""What other groups measured, repeated with this library, and what it adds beside."""
