"""What does an attribution cost, and how good is it: every estimator on the same networks, in one run."""
