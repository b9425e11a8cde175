"""How updates become one step of the model."""
