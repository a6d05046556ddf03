"""On which devices stages stand, and what a node keeps of the model for those to come."""
