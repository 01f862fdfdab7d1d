"""Drawings of single lessons: each module has the figures of one notebook, in the course's style."""
