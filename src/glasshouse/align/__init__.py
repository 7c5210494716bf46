"""Alignment: a constitution, feedback under it, reward models, and policies trained on both.

Everything that trains here is an objective and a `Trainee` of the one loop (`train.run_stages`).
"""
