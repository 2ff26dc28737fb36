"""Rollouts: samples of the policy, what they are worth, and the rows that a step learns from."""
