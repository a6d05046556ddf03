"""Other servers of the same model: their environments, how they are started, and how they are compared."""
