"""A recipe's constitutional phases: critique and revision, feedback, a reward model, and RL, in one run."""
