"""Answers from all and from pruned visual tokens, their scores, and pictures of the kept tokens."""
