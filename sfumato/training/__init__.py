"""Training on the engine's own model: data, the objective, and the loop that can be cut off and resumed."""
