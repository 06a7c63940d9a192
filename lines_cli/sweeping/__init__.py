"""`lines sweep`: coefficients chosen by an evaluation."""
