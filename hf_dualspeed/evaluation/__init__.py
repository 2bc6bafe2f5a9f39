"""Answers from all visual tokens and from pruned ones, scores, and pictures of what was kept."""
